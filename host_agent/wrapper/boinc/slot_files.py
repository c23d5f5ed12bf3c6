"""The small files of a slot through which an application and its client speak, beside the shared memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..checkpoint import write_atomically
from .runtime import Trickle

INIT_DATA_FILE = "init_data.xml"
FINISH_FILE = "boinc_finish_called"
TEMPORARY_EXIT_FILE = "boinc_temporary_exit"
TRICKLE_UP_FILE = "trickle_up.xml"
TRICKLE_DOWN_MARK = "trickle_down"  # anywhere in the name
UPLOAD_REQUEST_PREFIX = "boinc_ufr_"
UPLOAD_STATUS_PREFIX = "boinc_ufs_"

LONGEST_DELAY_S = 86400  # the client replaces a longer one by five minutes
_REASON_BYTES = 255  # what the client reads of a reason
_TRICKLE_BYTES = 1 << 20


def remove_old_ends(slot: Path) -> None:
    """What an earlier start left, which would otherwise speak for this one."""
    for name in (FINISH_FILE, TEMPORARY_EXIT_FILE):
        (slot / name).unlink(missing_ok=True)


def write_finish(slot: Path, status: int, message: str, is_notice: bool) -> None:
    """The job is over."""
    note = f"{_one_line(message)}\n{'notice' if is_notice else ''}\n" if message else ""
    write_atomically(slot / FINISH_FILE, f"{status}\n{note}")


def write_temporary_exit(slot: Path, delay_s: int, reason: str, is_notice: bool) -> None:
    """Start us again later."""
    delay = min(max(0, delay_s), LONGEST_DELAY_S)
    lines = [str(delay), *([_one_line(reason)] if reason else []), *(["notice"] if reason and is_notice else [])]
    write_atomically(slot / TEMPORARY_EXIT_FILE, "\n".join(lines) + "\n")


def write_trickle_up(slot: Path, variety: str, text: str) -> None:
    """A message for the project; the client takes the file away."""
    write_atomically(slot / TRICKLE_UP_FILE, f"<variety>{variety}</variety>\n{text}", durable=False)


def read_trickles_down(slot: Path) -> list[Trickle]:
    """Messages of the project, oldest first."""
    trickles = []
    with os.scandir(slot) as entries:
        names = sorted(entry.name for entry in entries if TRICKLE_DOWN_MARK in entry.name and entry.is_file())
    for name in names:
        try:
            with (slot / name).open("rb") as file:
                trickles.append(Trickle(name, file.read(_TRICKLE_BYTES).decode("utf-8", "replace")))
        except OSError:
            continue  # it went away between the two looks, or cannot be read: nobody is helped by an error
    return trickles


def request_upload(slot: Path, name: str) -> None:
    """Ask the client to upload a file of the slot; the file of an earlier answer goes."""
    (slot / f"{UPLOAD_STATUS_PREFIX}{name}").unlink(missing_ok=True)
    (slot / f"{UPLOAD_REQUEST_PREFIX}{name}").touch()


def read_upload_status(slot: Path, name: str) -> int | None:
    """The client's answer, or None while there is none."""
    try:
        with (slot / f"{UPLOAD_STATUS_PREFIX}{name}").open("rb") as file:
            match = re.search(rb"<status>\s*(-?\d+)\s*</status>", file.read(256))
    except OSError:
        return None
    return int(match[1]) if match else None


def _one_line(text: str) -> str:
    """What the client shows: it reads one line of limited length."""
    line = " ".join(text.split())
    return line.encode("utf-8")[:_REASON_BYTES].decode("utf-8", "ignore")
