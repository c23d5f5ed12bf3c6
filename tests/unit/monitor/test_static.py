"""What the page is made of: the plot library as it was released, and nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re

import pytest

from host_agent.monitor.page import FILES, STATIC
from host_agent.volunteer_page import FILES as VOLUNTEER_FILES

UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


@pytest.mark.parametrize("name", sorted(UPLOT))
def test_uplot_is_as_it_was_released(name: str) -> None:
    assert hashlib.sha256((STATIC / "uplot" / name).read_bytes()).hexdigest() == UPLOT[name]


def test_every_file_is_served_and_every_served_file_is_there() -> None:
    served = {name for name, _ in [*FILES.values(), *VOLUNTEER_FILES.values()]}
    there = {str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file()}
    assert there - served == {"uplot/LICENSE", "uplot/README.md"}
    assert served <= there


def test_our_files_name_no_other_place_and_set_no_markup() -> None:
    for name in ("index.html", "monitor.js", "tables.js", "plots.js", "monitor.css", "volunteer.html", "volunteer.js"):
        text = (STATIC / name).read_text("utf-8")
        assert re.findall(r"https?://\S+", text) == []
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bstyle=", text)
