"""A project and a client for the tests of this directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import attrs
import pytest

from common.errors import VMwrapperError
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import load_recipe

from .project import AppVersion, Project, Report, Work
from .real_client import RealClient, TaskState

ROOT = Path(__file__).resolve().parents[2]

# What a task of these tests does is its argument. It is an application file, so it is signed.
WORKER = b'#!/bin/sh\neval "$1"\n'
PYTHON_WORKER = b"#!/usr/bin/env python3\nimport sys\nopen('out', 'w').write(open('in').read().upper())\n"


def launcher(module: str) -> bytes:
    """The main program of an app version: this checkout's environment."""
    return f'#!/bin/sh\nexec "{sys.executable}" -P -m {module} "$@"\n'.encode()


def task(script: str, more: str = "") -> str:
    return f'<task><application>work.sh</application><command_line>"{escape(script)}"</command_line>{more}</task>\n'


def job(*parts: str) -> bytes:
    return f"<job_desc>\n{''.join(parts)}</job_desc>\n".encode()


@attrs.define
class Site:
    """A project and a client that is attached to it."""

    project: Project
    client: RealClient
    environment: dict[str, str]

    def start(self) -> None:
        self.client.start(self.environment)

    def report(self, work: Work, deadline_s: float = 90.0) -> Report:
        """What came of a job, once the client has told."""

        def told() -> bool:
            self.client.update(self.project.url)
            return self.project.wait(lambda: work.result in self.project.reports, 1.0)

        self.client.wait(told, f"{work.name} is reported", deadline_s)
        return self.project.reports[work.result]

    def state(self, work: Work) -> TaskState | None:
        return self.client.tasks().get(work.result)

    def wait_for_state(self, work: Work, active_state: str, deadline_s: float = 60.0) -> None:
        def reached() -> bool:
            state = self.state(work)
            return state is not None and state.active_state == active_state

        self.client.wait(reached, f"{work.name} is {active_state}", deadline_s)

    def slot(self, work: Work, file: str, deadline_s: float = 60.0) -> Path:
        """The slot of a job, once a file is in it."""

        def there() -> bool:
            try:
                return (self.client.slot_of(work.result) / file).exists()
            except (LookupError, FileNotFoundError):
                return False

        self.client.wait(there, f"{work.name} wrote {file}", deadline_s)
        return self.client.slot_of(work.result)

    def task(self, work: Work, operation: str) -> None:
        self.client.command("--task", self.project.url, work.result, operation)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guest image of this checkout is: built through the cache, in seconds."""
    output = tmp_path_factory.mktemp("images")
    try:
        build_image(load_recipe("debian-minimal"), output, Cache(default_cache()))
    except VMwrapperError as error:
        pytest.fail(f"the guest image cannot be built: {error.explain()}")
    return output


def make_site(directory: Path, *, leave_in_memory: bool = True, images: Path | None = None) -> Site:
    project = Project()
    project.add_version(
        AppVersion(100, {"launcher": launcher("host_agent.wrapper.main"), "work.sh": WORKER, "work.py": PYTHON_WORKER})
    )
    project.add_version(AppVersion(200, {"launcher": launcher("tests.boinc.talker")}, "talker"))
    client = RealClient(directory / "client", ncpus=8, leave_in_memory=leave_in_memory)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "VMWRAPPER_IMAGES": str(images or directory),
        "VMWRAPPER_RUNTIME": str(directory / "run"),
    }
    return Site(project, client, environment)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """For a test that does things to the client itself. What is suspended does not stay in memory."""
    made = make_site(tmp_path, leave_in_memory=False)
    yield made
    made.client.stop()
    made.project.close()
