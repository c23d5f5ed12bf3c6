"""Between an application and whoever started it: a BOINC client (`client.py`) or nobody (`standalone.py`).

Nothing here acts by itself: the application asks with `poll()` what the client wants, and does it.
Times are seconds, sizes are bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from common.errors import VMwrapperError

SERVICE_S = 0.5  # how often `service()` wants to be called: the client rings no bell


class HostInfo(NamedTuple):
    """What the client measured on this computer; 0 or empty: it did not say."""

    ncpus: int = 0
    fpops: float = 0.0  # floating point operations each second, of one processor
    iops: float = 0.0
    memory_bytes: float = 0.0
    swap_bytes: float = 0.0
    disk_total_bytes: float = 0.0
    disk_free_bytes: float = 0.0
    domain_name: str = ""
    os_name: str = ""
    os_version: str = ""
    cpu_vendor: str = ""
    cpu_model: str = ""
    virtualbox_version: str = ""


class Preferences(NamedTuple):
    """The volunteer's wishes that an application can follow; the client follows the others. 0: not given."""

    cpu_usage_percent: float = 0.0  # of the time; the client does this by suspending us
    max_ncpus_percent: float = 0.0
    memory_busy_percent: float = 0.0  # of the computer's, while it is in use
    memory_idle_percent: float = 0.0
    disk_max_bytes: float = 0.0
    disk_min_free_bytes: float = 0.0
    disk_max_percent: float = 0.0
    leave_in_memory: bool = False  # when suspended; else a suspend arrives as `Leave.QUIT`
    run_on_batteries: bool = False
    max_bytes_up_s: float = 0.0
    max_bytes_down_s: float = 0.0


def _shown(value: NamedTuple, hidden: frozenset[str]) -> str:
    """For logs: what is secret stays out of it."""
    words = (f"{name}={each!r}" for name, each in value._asdict().items() if name not in hidden)
    return f"{type(value).__name__}({', '.join(words)})"


class Proxy(NamedTuple):
    """How the volunteer's computer reaches the network; empty: directly."""

    http_host: str = ""
    http_port: int = 0
    http_user: str = ""
    http_password: str = ""  # not in `repr`
    socks_host: str = ""
    socks_port: int = 0
    socks_user: str = ""
    socks_password: str = ""  # not in `repr`
    no_proxy: str = ""  # names for which none is used, with commas

    def __repr__(self) -> str:
        return _shown(self, frozenset({"http_password", "socks_password"}))


class InitData(NamedTuple):
    """What the client tells its application at the start (`init_data.xml`), and again at `Status.reread`."""

    standalone: bool = True
    client_version: str = ""  # such as 7.20.5
    app_name: str = ""
    app_version: int = 0
    plan_class: str = ""
    app_files: tuple[str, ...] = ()  # physical names of the app version's signed files, where the client says them
    wu_name: str = ""
    result_name: str = ""
    project_dir: str = "."
    boinc_dir: str = ""
    project_preferences: str = ""  # the project's own XML
    user_id: int = 0
    team_id: int = 0
    host_id: int = 0
    user_name: str = ""
    team_name: str = ""
    authenticator: str = ""  # not in `repr`
    slot: int = 0
    client_pid: int = 0  # 0: an old client, whose heart-beat is its only sign of life
    shm_key: int = -1  # -1: the shared file of the slot (every client since version 6)
    comm_obj_name: str = ""  # Windows: the name of the shared memory
    wu_cpu_s: float = 0.0  # CPU time of all earlier starts, up to the last checkpoint
    starting_elapsed_s: float = 0.0  # run time, likewise
    checkpoint_period_s: float = 300.0
    fraction_start: float = 0.0  # the part of the client's progress bar that is ours
    fraction_end: float = 1.0
    gpu_type: str = ""
    gpu_device: int = -1  # below 0: not given
    gpu_opencl_device: int = -1
    gpu_usage: float = 0.0
    ncpus: float = 0.0  # how many processors this job was given; may be a fraction
    fpops_est: float = 0.0  # the project's estimate and limits for the job
    fpops_bound: float = 0.0
    memory_bound: float = 0.0
    disk_bound: float = 0.0
    deadline: float = 0.0  # seconds since 1970
    process_priority: int = 0  # the client's wish, 1 (lowest) to 5; 0: none, the job's counts
    process_priority_special: int = 0  # the same for coprocessor and wrapper applications
    no_priority_change: bool = False
    using_sandbox: bool = False
    vm_extensions_disabled: bool = False
    vbox_window: bool = False
    user_total_credit: float = 0.0
    host_total_credit: float = 0.0
    resource_share: float = 0.0
    host: HostInfo = HostInfo()
    preferences: Preferences = Preferences()
    proxy: Proxy = Proxy()

    def __repr__(self) -> str:
        return _shown(self, frozenset({"authenticator"}))


class Leave(enum.Enum):
    """Why the application has to go: within a minute, and without a finish file. The value ends a sentence."""

    STAY = ""
    QUIT = "the client's quit request"  # it will start us again
    ABORT = "the client's abort request"  # it will not
    NO_CLIENT = "the client being gone"  # the next one will start us again


class SporadicClient(enum.IntEnum):
    """What the client says to a sporadic application (one that computes only now and then)."""

    NONE = 0
    DONT_COMPUTE = 1
    COULD_COMPUTE = 2
    COMPUTING = 3


class SporadicApp(enum.IntEnum):
    """What a sporadic application says to the client."""

    NONE = 0
    DONT_WANT_COMPUTE = 1
    WANT_COMPUTE = 2


class Status(NamedTuple):
    """What the client wants right now."""

    suspended: bool = False
    leave: Leave = Leave.STAY
    reread: bool = False  # init_data.xml was written anew; true until `init_data()` was called
    network_suspended: bool = False
    network_available: bool = True  # after `need_network()`: whether it is there now
    working_set: float = 0.0  # of our processes, as the client measured it
    max_working_set: float = 0.0  # what we may have
    sporadic: SporadicClient = SporadicClient.NONE

    @property
    def quit_reason(self) -> str:
        """Not empty: end everything and exit without a finish file."""
        return self.leave.value


class Trickle(NamedTuple):
    """A message from the project."""

    name: str  # of its file in the slot
    text: str


class SlotBusyError(VMwrapperError):
    """Another process runs in this slot. The answer is `temporary_exit(SLOT_BUSY_DELAY_S, str(error))`."""


SLOT_BUSY_DELAY_S = 600


class Runtime(Protocol):
    """The application side of the BOINC client's protocol. Only `init()` waits, for a lock.

    A method that writes a file of the slot may raise OSError.
    """

    def init(self) -> InitData:
        """Once, before everything else: lock the slot, read what the client says, take up the conversation.

        Waits up to 35 s for an earlier application to leave the slot, then raises SlotBusyError.
        """

    def init_data(self) -> InitData:
        """Read `init_data.xml` again; what was read before when it cannot be read."""

    def service(self) -> bool:
        """Send what waits for a free channel; whether `poll()` has something new. A few memory reads: call it often."""

    def poll(self) -> Status:
        """Read what the client wrote since the last time, and look whether it lives."""

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
        """Tell the client how far we are; the newest report counts.

        CPU times are those since the beginning of the job, over all starts. `other_pid`: a process that is not our
        child and belongs to the job, which the client then measures and, if it must, kills.
        """

    def time_to_checkpoint(self) -> bool:
        """Whether the volunteer's interval between checkpoints is over."""

    def checkpoint_completed(self) -> None:
        """A checkpoint was written just now."""

    def begin_critical_section(self) -> None:
        """From here `poll()` says nothing of suspend and leave; sections may be nested."""

    def end_critical_section(self) -> None:
        """What the client asked for meanwhile is in the next `poll()`."""

    def resolve(self, name: str) -> str:
        """The path behind a file's name in the slot."""

    def send_trickle_up(self, variety: str, text: str) -> None:
        """Send a message to the project. They leave one after another, as fast as the client takes them."""

    def trickles_down(self) -> list[Trickle]:
        """Messages from the project that were not yet done."""

    def trickle_done(self, trickle: Trickle) -> None:
        """A message was acted on: remove it. Until then it comes back, also after a restart."""

    def upload_file(self, name: str) -> None:
        """Upload an output file (its name in the slot) now rather than at the end."""

    def upload_status(self, name: str) -> int | None:
        """0: uploaded; another number: BOINC's error; None: not known yet."""

    def need_network(self) -> None:
        """Ask the volunteer for a network connection; `Status.network_available` says when it is there."""

    def network_done(self) -> None: ...

    def web_graphics_url(self, url: str) -> None:
        """Where a browser sees the application's graphics."""

    def remote_desktop(self, address: str) -> None:
        """Where a remote desktop program sees the application's screen, `host:port`."""

    def sporadic(self, state: SporadicApp) -> None:
        """Whether a sporadic application wants to compute."""

    def finish(self, status: int, message: str = "", is_notice: bool = False) -> int:
        """The job is over: write the finish file, after the last report. Returns the status to exit with, now.

        `is_notice`: the client shows the message to the volunteer.
        """

    def temporary_exit(self, delay_s: int, reason: str, is_notice: bool = False) -> int:
        """Ask to be started again after a while (at most a day). Returns the status to exit with."""

    def close(self) -> None:
        """Let go of the slot. Without `finish()` or `temporary_exit()` the client starts us again at once."""


@contextmanager
def critical_section(runtime: Runtime) -> Iterator[None]:
    """Do something that the client must not interrupt."""
    runtime.begin_critical_section()
    try:
        yield
    finally:
        runtime.end_critical_section()
