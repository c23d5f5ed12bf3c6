"""Who may import whom, and what a start must not load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from host_agent.events import Happened

CALLS = ("host", "commands", "copies", "broker", "events", "output", "trace", "open_page")
ROOT = Path(__file__).resolve().parents[2]
THIRD_PARTY_OF_GUESTS = {"attrs", "stomp", "twisted", "zope"}


def imported(package: str) -> set[str]:
    """Top-level packages that any module of a package imports."""
    names: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("common", {"host_agent", "guest_agent", "vm_images"}),
        ("guest_agent", {"host_agent", "vm_images"}),
        ("host_agent", {"guest_agent"}),
    ],
)
def test_packages_keep_to_themselves(package: str, forbidden: set[str]) -> None:
    assert not imported(package) & forbidden


@pytest.mark.parametrize("package", ["common", "guest_agent"])
def test_the_guest_agent_needs_only_its_own_small_set(package: str) -> None:
    others = imported(package) - set(sys.stdlib_module_names) - {"common", "guest_agent"}
    assert others <= THIRD_PARTY_OF_GUESTS


def test_the_keeper_needs_only_the_standard_library() -> None:
    code = "import sys, guest_agent.keeper; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) <= {
        "guest_agent",
        "common",
        "__main__",
        "_distutils_hack",
    }


def test_a_boinc_application_needs_nothing_but_ours() -> None:
    code = (
        "import sys; before = set(sys.modules); import host_agent.wrapper.boinc.application, "
        "host_agent.wrapper.boinc.client, host_agent.wrapper.boinc.standalone; "
        "print(*sorted({n.partition('.')[0] for n in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"common", "host_agent"}


# What makes up most of a small program's start: attrs and dataclasses compile methods of every class, and read modules
# for it (`inspect`); the others are large, or bring large ones.
HEAVY = {"argparse", "asyncio", "attr", "ctypes", "dataclasses", "hashlib", "inspect", "lxml", "psutil", "subprocess"}
HEAVY |= {"tempfile", "twisted", "xml", "zope"}
MOST_MODULES = 125  # that a start loads beyond a bare Python's


def test_a_job_on_the_host_loads_little_until_its_file_is_read(tmp_path: Path) -> None:
    """Up to the moment when job.xml has been read, which is done by a child of its own."""
    (tmp_path / "job.xml").write_text("<job_desc><task><application>./none</application></task></job_desc>")
    code = (
        "import sys; before = set(sys.modules); from host_agent.wrapper import main; from pathlib import Path; "
        "main.build_wrapper(main.parse_options([]), Path.cwd()); print(*set(sys.modules) - before)"
    )
    argv = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "host_agent.wrapper.wrapper" in loaded
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()
    assert len(loaded) <= MOST_MODULES, sorted(loaded)


def test_what_runs_on_a_volunteers_host_does_without_the_extra_packages() -> None:
    """The host agent, too, until it is asked for metrics."""
    code = (
        "import sys; import host_agent.wrapper.main, host_agent.wrapper.guest_task, host_agent.wrapper.agent_process, "
        "host_agent.main, host_agent.agent, host_agent.volunteer_page, host_agent.vmctl.main; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {"prometheus_client", "textual", "rich"}


def loaded_after(imports: str) -> set[str]:
    """The modules of a process that has imported Twisted as the agents do, and then these."""
    code = (
        "import sys; from common.lean import import_twisted; import_twisted(); from twisted.internet import reactor; "
        f"import {imports}; print(*(name for name, module in sys.modules.items() if module is not None)); "
        "import asyncio, http.cookiejar; print(asyncio.run, http.cookiejar.CookieJar, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_host_agent_with_the_embedded_broker_holds_no_more_in_memory_than_it_needs() -> None:
    loaded = loaded_after("host_agent.main, host_agent.agent, host_agent.hypervisors.qemu")
    unneeded = {"asyncio", "http.client", "http.cookiejar", "lxml", "OpenSSL", "ssl", "stomp", "urllib.request"}
    assert not loaded & (unneeded | {"twisted.web.server", "twisted.web.xmlrpc"})


def test_the_wrapper_of_a_job_in_a_vm_holds_no_more_in_memory_than_it_needs() -> None:
    code = (
        "import sys; import host_agent.wrapper.main, host_agent.wrapper.guest_task, host_agent.wrapper.agent_process; "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"_hashlib", "random", "ssl", "stomp", "twisted"}


def test_a_guest_agent_holds_no_more_in_memory_than_it_needs() -> None:
    unneeded = {"asyncio", "http.client", "http.cookiejar", "OpenSSL", "twisted.web", "urllib.request"}
    assert not loaded_after("guest_agent.main, guest_agent.agent") & unneeded


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_the_control_interface_is_documented(call: str) -> None:
    assert f"`{call}`" in (ROOT / "docs/control.md").read_text("utf-8")


def test_every_event_is_documented() -> None:
    text = (ROOT / "docs/control.md").read_text("utf-8")
    assert [name for name in Happened if f"`{name}`" not in text] == []
