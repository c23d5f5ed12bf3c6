"""The application side of a BOINC client's protocol, in a slot that the client prepared.

The client never wakes us: it leaves a message in shared memory. So the application calls `service()` twice a second
(a few memory reads) and `poll()` once a second and whenever `service()` says that there is something.
What has to leave waits here until its channel is free; of reports only the newest does.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ..resolve import resolve_name
from . import slot_files
from .init_data import read_init_data
from .liveness import Liveness
from .lock_file import LockFile
from .messages import app_status, parse_heart_beat
from .runtime import InitData, Leave, SporadicApp, SporadicClient, Status, Trickle
from .shared_memory import Channel, SharedMemory, attach

MOST_TRICKLES = 32  # that wait to leave; the oldest goes first when there are more
FLUSH_S = 5.0  # how long `finish()` waits for the client to take trickles that wait behind another
_TRICKLE_GAP_S = 1.0  # the client names what it took by the second


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class ClientRuntime:
    """A `Runtime` with a client. `say`: where a line for a person goes."""

    def __init__(self, slot: Path, say: Callable[[str], None] = _to_stderr) -> None:
        self.slot = slot
        self._say = say
        self._lock = LockFile(slot)
        self._memory: SharedMemory | None = None
        self._data = InitData()
        self._data_mark: tuple[int, int] | None = None
        self._liveness = Liveness(0)
        self._status = Status()
        self._shown = Status()  # what a critical section holds on to
        self._critical = 0
        self._checkpointed = time.monotonic()
        self._report = ""
        self._want_network = False
        self._sporadic = SporadicApp.NONE
        self._graphics: list[str] = []
        self._announce: dict[str, None] = {}  # tags for the trickle-up channel
        self._trickles: deque[tuple[str, str]] = deque()
        self._trickle_gone = 0.0
        self._look_for_trickles = True

    def init(self) -> InitData:
        self._lock.acquire()
        slot_files.remove_old_ends(self.slot)
        data = self.init_data()
        if not data.standalone:
            try:
                self._memory = attach(self.slot, data)
            except OSError as error:
                self._say(f"running without a client: its shared memory cannot be used ({error})")
                self._data = data._replace(standalone=True)
        self._liveness = Liveness(data.client_pid)
        self._checkpointed = time.monotonic()
        if (self.slot / slot_files.TRICKLE_UP_FILE).exists():  # an earlier start was ended before it could say so
            self._announce[_HAVE_TRICKLE] = None
        return self._data

    def init_data(self) -> InitData:
        path = self.slot / slot_files.INIT_DATA_FILE
        self._data_mark = _mark(path)
        try:
            data = read_init_data(path)
        except OSError as error:
            data = None
            self._say(f"{path.name} cannot be read: {error.strerror}")
        if data is not None:
            self._data = data
        elif self._data.standalone:
            self._say(f"running without a client: {path.name} is not complete")
        self._status = self._status._replace(reread=False)
        return self._data

    def service(self) -> bool:
        if self._memory is None:
            return False
        self._send()
        return self._memory.full(Channel.PROCESS_CONTROL_REQUEST) or self._memory.full(Channel.TRICKLE_DOWN)

    def poll(self) -> Status:
        if self._memory is not None:
            self._read(self._memory)
            self._send()
        if self._critical:
            held = self._shown
            return self._status._replace(suspended=held.suspended, leave=held.leave)
        self._shown = self._status
        return self._status

    def report(
        self,
        cpu_s: float,
        checkpoint_cpu_s: float,
        fraction: float,
        *,
        working_set: float = 0.0,
        other_pid: int = 0,
        bytes_sent: float = 0.0,
        bytes_received: float = 0.0,
    ) -> None:
        if self._memory is None:
            return
        width = self._data.fraction_end - self._data.fraction_start
        self._report = app_status(
            cpu_s,
            checkpoint_cpu_s,
            self._data.fraction_start + min(max(fraction, 0.0), 1.0) * width,
            working_set=working_set,
            other_pid=other_pid,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            want_network=self._want_network,
            sporadic=self._sporadic,
        )
        self._send()

    def time_to_checkpoint(self) -> bool:
        return time.monotonic() - self._checkpointed >= self._data.checkpoint_period_s

    def checkpoint_completed(self) -> None:
        self._checkpointed = time.monotonic()

    def begin_critical_section(self) -> None:
        self._critical += 1

    def end_critical_section(self) -> None:
        self._critical = max(0, self._critical - 1)

    def resolve(self, name: str) -> str:
        return resolve_name(self.slot, name)

    def send_trickle_up(self, variety: str, text: str) -> None:
        if self._memory is None:
            slot_files.write_trickle_up(self.slot, variety, text)
            return
        if len(self._trickles) >= MOST_TRICKLES:
            self._trickles.popleft()
            self._say("a trickle-up was dropped: the client takes none")
        self._trickles.append((variety, text))
        self._send()

    def trickles_down(self) -> list[Trickle]:
        if not self._look_for_trickles:
            return []
        trickles = slot_files.read_trickles_down(self.slot)
        self._look_for_trickles = bool(trickles)
        return trickles

    def trickle_done(self, trickle: Trickle) -> None:
        (self.slot / trickle.name).unlink(missing_ok=True)

    def upload_file(self, name: str) -> None:
        slot_files.request_upload(self.slot, name)
        self._announce[_HAVE_UPLOAD] = None
        self._send()

    def upload_status(self, name: str) -> int | None:
        return slot_files.read_upload_status(self.slot, name)

    def need_network(self) -> None:
        self._want_network = True
        self._status = self._status._replace(network_available=False)

    def network_done(self) -> None:
        self._want_network = False

    def web_graphics_url(self, url: str) -> None:
        self._graphics.append(f"<web_graphics_url>{url}</web_graphics_url>")
        self._send()

    def remote_desktop(self, address: str) -> None:
        self._graphics.append(f"<remote_desktop_addr>{address}</remote_desktop_addr>")
        self._send()

    def sporadic(self, state: SporadicApp) -> None:
        self._sporadic = state

    def finish(self, status: int, message: str = "", is_notice: bool = False) -> int:
        self._flush()
        self._send_last()
        slot_files.write_finish(self.slot, status, message, is_notice)
        return status

    def temporary_exit(self, delay_s: int, reason: str, is_notice: bool = False) -> int:
        self._send_last()
        slot_files.write_temporary_exit(self.slot, delay_s, reason, is_notice)
        return 0

    def close(self) -> None:
        self._send_last()
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()
        self._lock.release()

    def _read(self, memory: SharedMemory) -> None:
        """Everything that the client wrote since the last time."""
        status = self._status
        text = memory.take(Channel.HEARTBEAT)
        if text is not None:
            heart = parse_heart_beat(text)
            status = status._replace(
                working_set=status.working_set if heart.working_set is None else heart.working_set,
                max_working_set=status.max_working_set if heart.max_working_set is None else heart.max_working_set,
                network_suspended=heart.network_suspended,
                sporadic=_sporadic_client(heart.sporadic, status.sporadic),
            )
        if not self._liveness.alive(text is not None):
            # What stands in the memory from here on may be for the application that the next client starts.
            self._status = status._replace(leave=Leave.NO_CLIENT)
            return
        if control := memory.take(Channel.PROCESS_CONTROL_REQUEST):
            status = _obey(status, control)
        if trickle := memory.take(Channel.TRICKLE_DOWN):
            self._look_for_trickles = self._look_for_trickles or "<have_trickle_down/>" in trickle
        if not status.reread and _mark(self.slot / slot_files.INIT_DATA_FILE) != self._data_mark:
            status = status._replace(reread=True)  # changed preferences come without a message
        self._status = status

    def _send(self) -> None:
        """Put what waits into the channels that are free."""
        memory = self._memory
        if memory is None or self._status.leave is Leave.NO_CLIENT:
            return
        if self._report and memory.put(Channel.APP_STATUS, self._report):
            self._report = ""
        if self._graphics and memory.put(Channel.GRAPHICS_REPLY, self._graphics[0]):
            del self._graphics[0]
        if self._trickles:
            self._next_trickle()
        if self._announce and memory.put(Channel.TRICKLE_UP, "\n".join(self._announce) + "\n"):
            self._announce.clear()

    def _send_last(self) -> None:
        """The newest report, whether the client took the one before or not: it looks once more when we have ended."""
        if self._memory is not None and self._report and self._status.leave is not Leave.NO_CLIENT:
            self._memory.replace(Channel.APP_STATUS, self._report)
            self._report = ""

    def _next_trickle(self) -> None:
        """Write the next one when the client has taken the one before."""
        now = time.monotonic()
        if (self.slot / slot_files.TRICKLE_UP_FILE).exists():
            self._trickle_gone = now
        elif now - self._trickle_gone >= _TRICKLE_GAP_S:
            self._trickle_gone = now
            slot_files.write_trickle_up(self.slot, *self._trickles.popleft())
            self._announce[_HAVE_TRICKLE] = None

    def _flush(self) -> None:
        """Wait, if need be, until all trickles but the last are gone: that one the client takes after our end."""
        until = time.monotonic() + FLUSH_S
        while self._memory is not None and (self._trickles or self._announce) and time.monotonic() < until:
            time.sleep(0.05)
            if self.poll().leave is Leave.NO_CLIENT:
                break


_HAVE_TRICKLE = "<have_new_trickle_up/>"
_HAVE_UPLOAD = "<have_new_upload_file/>"


def _obey(status: Status, text: str) -> Status:
    """What the client's wish makes of a status."""
    if "<suspend/>" in text:
        status = status._replace(suspended=True)
    if "<resume/>" in text:
        status = status._replace(suspended=False)
    if "<quit/>" in text and status.leave is Leave.STAY:
        status = status._replace(leave=Leave.QUIT)
    if "<abort/>" in text:
        status = status._replace(leave=Leave.ABORT)
    if "<reread_app_info/>" in text:
        status = status._replace(reread=True)
    if "<network_available/>" in text:
        status = status._replace(network_available=True)
    return status


def _sporadic_client(value: int | None, before: SporadicClient) -> SporadicClient:
    try:
        return before if value is None else SporadicClient(value)
    except ValueError:  # of a later client
        return before


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size
