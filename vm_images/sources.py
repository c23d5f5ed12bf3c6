"""Where Debian comes from: the host's own apt sources. No archive's address stands in this project."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from .tools import BuildError

APT = Path("/etc/apt")
# Options of a source that change what is fetched or trusted, as the one-line format spells them.
_OPTIONS = {"Signed-By": "signed-by", "Trusted": "trusted", "Check-Valid-Until": "check-valid-until"}


def debian_sources(release: str, apt: Path = APT) -> list[str]:
    """One-line sources of `release`, its updates and its security fixes, component main.

    A host of another Debian release has them in the same archive. BuildError when there is no such archive here.
    """
    suites = {release, f"{release}-updates", f"{release}-security"}
    found: dict[str, None] = {}
    archives: dict[str, None] = {}
    for options, uri, suite, components in _entries(apt):
        if suite.rstrip("/").removesuffix("/updates") in suites and "main" in components:
            found.setdefault(_line(options, uri, suite))
        if uri.rstrip("/").endswith("/debian") and "-" not in suite and "main" in components:
            archives.setdefault(_line(options, uri, release))
    if any(line.split()[-2] == release for line in found):
        return list(found)
    if archives:
        return list(archives)[:1]
    raise BuildError(
        f"this host's apt has no source of Debian {release}",
        f"add one with the suite {release} and the component main to {apt}/sources.list.d",
    )


def _line(options: dict[str, str], uri: str, suite: str) -> str:
    text = " ".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"deb {f'[{text}] ' if text else ''}{uri} {suite} main"


Entry = tuple[dict[str, str], str, str, list[str]]


def _entries(apt: Path) -> Iterator[Entry]:
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        text = path.read_text("utf-8", "replace")
        if path.suffix == ".sources":
            yield from _deb822(text)
        elif path.suffix == ".list":
            yield from _one_line(text)


def _one_line(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        if not line.startswith("deb "):
            continue
        options: dict[str, str] = {}
        rest = line[4:].strip()
        if rest.startswith("["):
            inside, _, rest = rest[1:].partition("]")
            for option in shlex.split(inside):
                key, _, value = option.partition("=")
                if key.lower() in _OPTIONS.values():
                    options[key.lower()] = value
        words = rest.split()
        if len(words) >= 3:
            yield options, words[0], words[1], words[2:]


def _deb822(text: str) -> Iterator[Entry]:
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in lines.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
            else:
                key, _, value = line.partition(":")
                key = key.strip().title()
                fields[key] = value.strip()
        if "deb" not in fields.get("Types", "").split() or fields.get("Enabled", "yes").lower() == "no":
            continue
        # A key given inline (Signed-By with the key's text) has no one-line form: mmdebstrap finds the keyring.
        options = {
            short: fields[long] for long, short in _OPTIONS.items() if fields.get(long) and "PGP" not in fields[long]
        }
        for uri in fields.get("Uris", "").split():
            for suite in fields.get("Suites", "").split():
                yield options, uri, suite, fields.get("Components", "").split()
