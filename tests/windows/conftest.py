"""One wine for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .wine import Wine, running_wine


@pytest.fixture(scope="session")
def wine() -> Iterator[Wine]:
    with running_wine() as running:
        yield running
