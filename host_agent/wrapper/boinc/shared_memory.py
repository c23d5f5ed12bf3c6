"""The memory that the client shares with its application: eight channels of one message each.

Byte 0 of a channel says whether a message is there, then comes its text, ended by NUL. A sender writes only when the
flag is 0, and the receiver clears it. Nothing wakes the other side.
"""

from __future__ import annotations

import enum
import mmap
import os
from pathlib import Path

from . import windows
from .runtime import InitData

MEMORY_FILE = "boinc_mmap_file"
CHANNEL_BYTES = 1024
LONGEST = CHANNEL_BYTES - 3  # the flag, the NUL, and one more that the client's library never copies


class Channel(enum.IntEnum):
    """The channels, in their order in the memory."""

    PROCESS_CONTROL_REQUEST = 0  # to us: suspend, resume, quit, abort
    PROCESS_CONTROL_REPLY = 1
    GRAPHICS_REQUEST = 2
    GRAPHICS_REPLY = 3  # from us: where our graphics are
    HEARTBEAT = 4  # to us
    APP_STATUS = 5  # from us: how far we are
    TRICKLE_UP = 6  # from us: files of the slot are there for the client
    TRICKLE_DOWN = 7  # to us: likewise


SIZE = CHANNEL_BYTES * len(Channel)


class SharedMemory:
    """One side of the conversation; the client's side in tests is the same class."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def full(self, channel: Channel) -> bool:
        """Whether a message waits there."""
        return self._memory[channel * CHANNEL_BYTES] != 0

    def take(self, channel: Channel) -> str | None:
        """The message, which is then gone; None when there is none."""
        start = channel * CHANNEL_BYTES
        if self._memory[start] == 0:
            return None
        text = self._memory[start + 1 : start + CHANNEL_BYTES]
        self._memory[start] = 0
        return text.partition(b"\0")[0].decode("utf-8", "replace")

    def put(self, channel: Channel, text: str) -> bool:
        """Send a message; False, and nothing is done, while an earlier one waits there."""
        if self.full(channel):
            return False
        self._write(channel, text)
        return True

    def replace(self, channel: Channel, text: str) -> None:
        """Send a message in place of one that may wait there. Only for the last one, when nobody can wait any more:
        a reader who is at it just now may see a mixture."""
        self._memory[channel * CHANNEL_BYTES] = 0
        self._write(channel, text)

    def close(self) -> None:
        self._memory.close()

    def _write(self, channel: Channel, text: str) -> None:
        start = channel * CHANNEL_BYTES
        data = text.encode("utf-8", "replace")
        if len(data) > LONGEST:
            raise ValueError(f"a message of {len(data)} bytes does not fit into a channel")
        self._memory[start + 1 : start + 2 + len(data)] = data + b"\0"
        self._memory[start] = 1  # last: from here on the other side reads it


def attach(slot: Path, data: InitData) -> SharedMemory:
    """The client's shared memory. Raises OSError when there is none."""
    if os.name == "nt":
        if not data.comm_obj_name:
            raise OSError("the client gave no name of the shared memory")
        return SharedMemory(windows.open_mapping(f"shm_{data.comm_obj_name}", SIZE))
    if data.shm_key != -1:
        raise OSError("the client uses System V shared memory, as clients before version 6 did")
    with (slot / MEMORY_FILE).open("r+b") as file:
        try:
            return SharedMemory(mmap.mmap(file.fileno(), SIZE))
        except ValueError as error:  # the file is too short
            raise OSError(f"{MEMORY_FILE}: {error}") from None
