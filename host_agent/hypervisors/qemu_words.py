"""How QEMU's options are written."""

from __future__ import annotations


def value(text: object) -> str:
    """A value inside one of its comma-separated options."""
    return str(text).replace(",", ",,")
