"""Running without a BOINC client: the same files in the slot, nobody to talk to."""

from __future__ import annotations

from pathlib import Path

from ..resolve import resolve_name
from . import slot_files
from .lock_file import LockFile
from .runtime import InitData, SporadicApp, Status, Trickle


class StandaloneRuntime:
    """A `Runtime` for a slot without a client."""

    def __init__(self, slot: Path) -> None:
        self.slot = slot
        self._lock = LockFile(slot)

    def init(self) -> InitData:
        self._lock.acquire()
        slot_files.remove_old_ends(self.slot)
        return self.init_data()

    def init_data(self) -> InitData:
        return InitData()

    def service(self) -> bool:
        return False

    def poll(self) -> Status:
        return Status()

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
        pass

    def time_to_checkpoint(self) -> bool:
        return True

    def checkpoint_completed(self) -> None:
        pass

    def begin_critical_section(self) -> None:
        pass

    def end_critical_section(self) -> None:
        pass

    def resolve(self, name: str) -> str:
        return resolve_name(self.slot, name)

    def send_trickle_up(self, variety: str, text: str) -> None:
        slot_files.write_trickle_up(self.slot, variety, text)

    def trickles_down(self) -> list[Trickle]:
        return slot_files.read_trickles_down(self.slot)

    def trickle_done(self, trickle: Trickle) -> None:
        (self.slot / trickle.name).unlink(missing_ok=True)

    def upload_file(self, name: str) -> None:
        pass

    def upload_status(self, name: str) -> int | None:
        return None

    def need_network(self) -> None:
        pass

    def network_done(self) -> None:
        pass

    def web_graphics_url(self, url: str) -> None:
        pass

    def remote_desktop(self, address: str) -> None:
        pass

    def sporadic(self, state: SporadicApp) -> None:
        pass

    def finish(self, status: int, message: str = "", is_notice: bool = False) -> int:
        slot_files.write_finish(self.slot, status, message, is_notice)
        return status

    def temporary_exit(self, delay_s: int, reason: str, is_notice: bool = False) -> int:
        slot_files.write_temporary_exit(self.slot, delay_s, reason, is_notice)
        return 0

    def close(self) -> None:
        self._lock.release()
