"""Twisted without what it imports and no program of ours uses: asyncio, cookies, pyOpenSSL.

Together they are half of what an agent holds in memory before it does anything, and a good part of a second of an
emulated machine's boot: cookies bring urllib, email and HTTP's client along, and pyOpenSSL, which Twisted takes
wherever it is installed, brings cryptography. TLS here is the standard library's (`tls.py`).
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType


def import_twisted() -> None:
    """Call before anything of Twisted is imported; later it changes nothing.

    What asks for asyncio or cookies after this gets the real ones. pyOpenSSL stays away: a program that uses
    `twisted.internet.ssl` must not call this.
    """
    if "twisted.internet.defer" in sys.modules:
        return
    sys.modules.setdefault("OpenSSL", None)  # type: ignore[arg-type]  # to import it is an ImportError from now on
    stand_ins = [name for name in ("asyncio", "http.cookiejar") if name not in sys.modules]
    for name in stand_ins:
        sys.modules[name] = _stand_in(name)
    try:
        import twisted.internet.defer
        import twisted.python.compat  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _stand_in(name: str) -> ModuleType:
    """A module that has every name: what Twisted takes of it are types for its annotations, but for one function."""
    module = ModuleType(name)

    def anything(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return object

    module.__dict__.update(__getattr__=anything, iscoroutine=inspect.iscoroutine)
    return module
