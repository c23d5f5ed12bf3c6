from __future__ import annotations

from pathlib import Path

import pytest

from vm_images.sources import debian_sources
from vm_images.tools import BuildError

DEB822 = """\
# a comment
Types: deb
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
# another
Components: main contrib
Signed-By: /usr/share/keyrings/k.gpg

Types: deb deb-src
URIs: http://mirror.test/security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.test/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://other.test/apt
Suites: nodistro
Components: main
"""


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822(apt: Path) -> None:
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
    assert debian_sources("bookworm", apt) == [
        "deb [signed-by=/usr/share/keyrings/k.gpg] http://mirror.test/debian bookworm main",
        "deb [signed-by=/usr/share/keyrings/k.gpg] http://mirror.test/debian bookworm-updates main",
        "deb http://mirror.test/security bookworm-security main",
    ]


def test_one_line_format(apt: Path) -> None:
    (apt / "sources.list").write_text(
        "# deb http://no.test/debian bookworm main\n"
        "deb [arch=amd64 trusted=yes] http://mirror.test/debian bookworm main contrib # why\n"
        "deb-src http://mirror.test/debian bookworm main\n"
        "deb http://tools.test/apt tools-bookworm main\n"
    )
    assert debian_sources("bookworm", apt) == ["deb [trusted=yes] http://mirror.test/debian bookworm main"]


def test_a_host_of_another_debian_release_uses_the_same_archive(apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://mirror.test/debian trixie main\n")
    assert debian_sources("bookworm", apt) == ["deb http://mirror.test/debian bookworm main"]


@pytest.mark.parametrize(
    "line", ["deb http://mirror.test/ubuntu noble main", "deb http://mirror.test/security bookworm-security main", ""]
)
def test_a_host_without_a_debian_archive_says_what_to_add(apt: Path, line: str) -> None:
    (apt / "sources.list").write_text(line + "\n")
    with pytest.raises(BuildError, match="no source of Debian bookworm"):
        debian_sources("bookworm", apt)
