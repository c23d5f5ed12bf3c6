"""A BOINC application that does what it is told on standard input and answers in a line, once with BOINC's own library
and once with our runtime: `python -m tests.boinc.drivers official|ours`, in a slot.

Both are used as a wrapper uses them: nothing happens to the process by itself, wishes are only told.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Protocol

from host_agent.wrapper.boinc import connect
from host_agent.wrapper.boinc.runtime import Leave

LIBRARY = "libboinc_api.so.7"


class Driver(Protocol):
    """Each method is a command; its arguments are words."""

    def init(self) -> str: ...
    def status(self) -> str: ...
    def report(self, cpu: str, checkpoint: str, fraction: str, pid: str, sent: str, received: str) -> str: ...
    def trickle(self, variety: str, text: str) -> str: ...
    def receive(self) -> str: ...
    def upload(self, name: str) -> str: ...
    def uploaded(self, name: str) -> str: ...
    def url(self, url: str) -> str: ...
    def desktop(self, address: str) -> str: ...
    def resolve(self, name: str) -> str: ...
    def finish(self, status: str, *message: str) -> str: ...
    def temporary(self, delay: str, *reason: str) -> str: ...


class Ours:
    """Our runtime."""

    def __init__(self) -> None:
        self.runtime = connect(Path.cwd())

    def init(self) -> str:
        return f"standalone={int(self.runtime.init().standalone)}"

    def status(self) -> str:
        status = self.runtime.poll()
        leave = status.leave
        return (
            f"no_heartbeat={int(leave is Leave.NO_CLIENT)} suspended={int(status.suspended)} "
            f"quit={int(leave is Leave.QUIT)} abort={int(leave is Leave.ABORT)} reread={int(status.reread)} "
            f"wss={status.working_set:g} max={status.max_working_set:g}"
        )

    def report(self, cpu: str, checkpoint: str, fraction: str, pid: str, sent: str, received: str) -> str:
        self.runtime.report(
            float(cpu),
            float(checkpoint),
            float(fraction),
            other_pid=int(pid),
            bytes_sent=float(sent),
            bytes_received=float(received),
        )
        return ""

    def trickle(self, variety: str, text: str) -> str:
        self.runtime.send_trickle_up(variety, text)
        return ""

    def receive(self) -> str:
        self.runtime.poll()
        return " ".join(trickle.name for trickle in self.runtime.trickles_down()[:1])

    def upload(self, name: str) -> str:
        self.runtime.upload_file(name)
        return ""

    def uploaded(self, name: str) -> str:
        return str(self.runtime.upload_status(name))

    def url(self, url: str) -> str:
        self.runtime.web_graphics_url(url)
        return ""

    def desktop(self, address: str) -> str:
        self.runtime.remote_desktop(address)
        return ""

    def resolve(self, name: str) -> str:
        return self.runtime.resolve(name)

    def finish(self, status: str, *message: str) -> str:
        code = self.runtime.finish(int(status), " ".join(message), is_notice=True)
        self.runtime.close()
        os._exit(code)

    def temporary(self, delay: str, *reason: str) -> str:
        code = self.runtime.temporary_exit(int(delay), " ".join(reason))
        self.runtime.close()
        os._exit(code)


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in (
        "normal_thread_priority", "main_program", "check_heartbeat", "handle_process_control",
        "send_status_msgs", "direct_process_action", "multi_thread", "multi_process",
    )]  # fmt: skip


class _Status(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("no_heartbeat", "suspended", "quit", "reread", "abort")),
        ("wss", ctypes.c_double),
        ("max", ctypes.c_double),
        ("network_suspended", ctypes.c_int),
    ]


class _String(ctypes.Structure):
    """`std::string` of GNU's C++ library, for names that do not fit into it itself."""

    _fields_ = [
        ("data", ctypes.c_char_p),
        ("size", ctypes.c_size_t),
        ("capacity", ctypes.c_size_t),
        ("_", ctypes.c_size_t),
    ]


class Official:
    """BOINC's own library. It redirects our standard error, and takes SIGALRM."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(LIBRARY)
        self.report_aux = self.library._Z27boinc_report_app_status_auxdddidd
        double = ctypes.c_double
        self.report_aux.argtypes = [double, double, double, ctypes.c_int, double, double]

    def init(self) -> str:
        options = _Options(main_program=1, check_heartbeat=1, handle_process_control=1)
        assert self.library.boinc_init_options(ctypes.byref(options)) == 0
        return f"standalone={self.library.boinc_is_standalone()}"

    def status(self) -> str:
        status = _Status()
        self.library.boinc_get_status(ctypes.byref(status))
        return (
            f"no_heartbeat={status.no_heartbeat} suspended={status.suspended} quit={status.quit} abort={status.abort} "
            f"reread={status.reread} wss={status.wss:g} max={status.max:g}"
        )

    def report(self, cpu: str, checkpoint: str, fraction: str, pid: str, sent: str, received: str) -> str:
        self.report_aux(float(cpu), float(checkpoint), float(fraction), int(pid), float(sent), float(received))
        return ""

    def trickle(self, variety: str, text: str) -> str:
        self.library.boinc_send_trickle_up(variety.encode(), text.encode())
        return ""

    def receive(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        return buffer.value.decode() if self.library.boinc_receive_trickle_down(buffer, 256) else ""

    def upload(self, name: str) -> str:
        data = name.encode()
        string = _String(data, len(data), len(data), 0)
        upload = self.library._Z17boinc_upload_fileRNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE
        assert upload(ctypes.byref(string)) == 0
        return ""

    def uploaded(self, name: str) -> str:
        data = name.encode()
        string = _String(data, len(data), len(data), 0)
        upload = self.library._Z19boinc_upload_statusRNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE
        status = upload(ctypes.byref(string))
        return "None" if status == -161 else str(status)  # ERR_NOT_FOUND

    def url(self, url: str) -> str:
        self.library.boinc_web_graphics_url(url.encode())
        return ""

    def desktop(self, address: str) -> str:
        self.library.boinc_remote_desktop_addr(address.encode())
        return ""

    def resolve(self, name: str) -> str:
        buffer = ctypes.create_string_buffer(1024)
        self.library.boinc_resolve_filename(name.encode(), buffer, 1024)
        return buffer.value.decode()

    def finish(self, status: str, *message: str) -> str:
        self.library._Z20boinc_finish_messageiPKcb(int(status), " ".join(message).encode() or None, ctypes.c_bool(True))
        raise AssertionError("it returned")

    def temporary(self, delay: str, *reason: str) -> str:
        self.library._Z20boinc_temporary_exitiPKcb(int(delay), " ".join(reason).encode(), ctypes.c_bool(False))
        raise AssertionError("it returned")


def main() -> None:
    driver: Driver = Official() if sys.argv[1] == "official" else Ours()
    while line := os.read(0, 4096):  # the library's alarm does not disturb it: Python goes on reading
        for command in line.decode().splitlines():
            name, *words = command.split()
            sys.stdout.write(f"{getattr(driver, name)(*words)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
