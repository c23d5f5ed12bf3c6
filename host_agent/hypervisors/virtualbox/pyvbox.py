"""pyvbox's library (PyPI and import name `virtualbox`), made to work with VirtualBox 6.1 to 7.2.

It was generated from 6.1's interface. Three things are put right when it is loaded: enum values come from the
running version; `bool()` of an interface is whether there is one, where pyvbox's own looks at the remote object and
has crashed VirtualBox's service; and `vboxapi`, which comes with VirtualBox and not from PyPI, is looked for where
VirtualBox's installers leave it, because a virtual environment does not see it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from .causes import explain

GET_VBOXAPI = (
    "it comes with VirtualBox (Debian's package virtualbox; elsewhere: python3 vboxapisetup.py install in "
    "VirtualBox's sdk/install); set VBOX_SDK_PATH to the folder that holds vboxapi if it lies elsewhere"
)


class BoxError(Exception):
    """What could not be done; a sentence, with the next step in `hint`."""

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint


class ServiceLost(BoxError):
    """VirtualBox's service has ended or cannot be reached; every object that it gave is worth nothing now."""


@attrs.frozen
class Pyvbox:
    """The library, ready to use, and what was found while loading it."""

    library: Any
    manager: Any  # vboxapi's VirtualBoxManager: for what pyvbox does not know
    vbox: Any  # pyvbox's IVirtualBox
    session: Any  # makes a new pyvbox ISession
    vboxapi: str  # where it was found

    def value(self, enum: str, name: str) -> int:
        """An enum's value in the running version."""
        return int(self.manager.constants.all_values(enum)[name])

    def member(self, enum: str, name: str) -> Any:
        """The same as pyvbox's own object, which its methods ask for."""
        return getattr(self.library, enum)(self.value(enum, name))


def load() -> Pyvbox:
    """Find vboxapi, load pyvbox, connect to VirtualBox's service; BoxError says what is missing."""
    vboxapi = _vboxapi()
    try:
        import virtualbox
        from virtualbox import library_base
    except ImportError as error:
        raise BoxError(
            f"pyvbox's library is missing ({error})",
            "pip install virtualbox==2.1.1 (not pyvbox: it cannot be imported)",
        ) from None
    library = virtualbox.library
    library_base.Interface.__bool__ = lambda self: self._i is not None
    library.IVirtualBox.assert_version = False
    try:
        manager = virtualbox.Manager()
        vbox = manager.get_virtualbox()
        _rebuild_enums(library, library_base.Enum, manager.manager.constants)
    except Exception as error:
        sentence, hint = explain("VirtualBox is installed, but its service cannot be reached", words(error))
        raise ServiceLost(
            sentence, hint or "does `VBoxManage list vms` work? Installing VirtualBox again may help"
        ) from None
    return Pyvbox(library, manager.manager, vbox, manager.get_session, vboxapi)


def _vboxapi() -> str:
    try:
        with _search_path():
            module = importlib.import_module("vboxapi")
    except ImportError as error:
        if error.name == "vboxapi":
            raise BoxError("VirtualBox's Python bindings (vboxapi) were not found", GET_VBOXAPI) from None
        raise BoxError(
            f"VirtualBox's Python bindings cannot be loaded ({error})",
            f"this Python is {sys.version.split()[0]}; has VirtualBox bindings for it?",
        ) from None
    except Exception as error:  # it looks for VirtualBox while it is imported
        raise BoxError(f"VirtualBox's Python bindings cannot be loaded ({error})", GET_VBOXAPI) from None
    return str(Path(module.__file__ or "").parent)


@contextmanager
def _search_path() -> Iterator[None]:
    """The places of vboxapi behind the environment's own, and only while it is imported."""
    added = [str(place) for place in _places() if place.is_dir()]
    sys.path.extend(added)
    try:
        yield
    finally:
        # Not what vboxapi has added itself: it needs that later.
        for place in added:
            sys.path.remove(place)


def _places() -> list[Path]:
    if chosen := os.environ.get("VBOX_SDK_PATH"):
        return [Path(chosen)]
    sdk = ("sdk/installer/python/vboxapi/src", "sdk/install")
    if sys.platform == "win32":
        homes = [os.environ.get("VBOX_MSI_INSTALL_PATH"), r"C:\Program Files\Oracle\VirtualBox"]
    elif sys.platform == "darwin":
        homes = ["/Applications/VirtualBox.app/Contents/MacOS"]
    else:
        homes = [os.environ.get("VBOX_INSTALL_PATH"), "/usr/lib/virtualbox", "/opt/VirtualBox"]
    places = [Path(home) / folder for home in homes if home for folder in sdk]
    return [*places, Path("/usr/lib/python3/dist-packages")]


def _rebuild_enums(library: Any, base: Any, constants: Any) -> None:
    """Give pyvbox's enums the values of the running version; those that it does not know stay as they are."""
    every: list[tuple[str, Any]] = list(vars(library).items())
    for name, enum in every:
        if not (isinstance(enum, type) and issubclass(enum, base) and enum is not base):
            continue
        try:
            values = dict(constants.all_values(name))
        except Exception:  # an enum that this version does not have
            values = {}
        if not values:
            continue
        type.__setattr__(enum, "_enums", [(label, value, "") for label, value in values.items()])
        # FirstOnline and the like are second names of values that have one of their own.
        named = sorted(values.items(), key=lambda item: not item[0].startswith(("First", "Last")))
        type.__setattr__(enum, "_lookup_label", {value: label for label, value in named})
        type.__setattr__(enum, "_lookup_doc", dict.fromkeys(values.values(), ""))
        for label, value in values.items():
            setattr(enum, _pythonic(label), enum(value))


def _pythonic(label: str) -> str:
    from virtualbox.library_base import pythonic_name

    return str(pythonic_name(label))


def words(error: BaseException) -> str:
    """VirtualBox's own text for a failure, whichever layer raised it."""
    if told := _told_by_com(error):
        return str(told[2])
    for attribute in ("msg", "message"):
        text = getattr(error, attribute, None)
        if isinstance(text, str) and text:
            return text
    return str(error) or type(error).__name__


def status(error: BaseException) -> int:
    """The result code of a failure as an unsigned number, or 0."""
    if told := _told_by_com(error):
        return int(told[5]) & 0xFFFFFFFF
    for attribute in ("value", "errno", "hresult"):
        code = getattr(error, attribute, None)
        if isinstance(code, int) and code != -1:
            return code & 0xFFFFFFFF
    return 0


def _told_by_com(error: BaseException) -> tuple[Any, ...] | None:
    """What Windows' COM error has of VirtualBox's own: its text is the third, its code the last. The error itself says
    only that there was an exception."""
    told = getattr(error, "excepinfo", None)
    return told if isinstance(told, tuple) and len(told) == 6 and told[2] and told[5] else None


# VirtualBox's service is gone: NS_ERROR_ABORT, NS_ERROR_CALL_FAILED, and what Windows says for the same.
DEAD = {0x80004004, 0x800706BE, 0x800706BA, 0x800706BF, 0x80010108, 0x800706B5, 0xC1F30001, 0xC1F30002}
