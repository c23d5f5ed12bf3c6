"""`vmwrapper-host-agent` whose process guests are guest agents of Windows, under wine: all else is as it is."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

from host_agent.hypervisors import process
from host_agent.main import main

from .wine import windows_path

ARGV = "VMWRAPPER_TEST_WINE"  # JSON: words that start a guest agent under wine; environment included


def guest_argv(wine: list[str], environment: dict[str, str]) -> list[str]:
    settings = [f"{name}={value}" for name, value in environment.items()]
    piped = [sys.executable, str(Path(__file__).with_name("piped.py"))]
    return ["/usr/bin/env", *settings, *piped, *wine]


if __name__ == "__main__":
    told = json.loads(os.environ.pop(ARGV))
    os.environ[process.AGENT] = shlex.join(guest_argv(told["argv"], told["environment"]))
    process.ProcessMachine.shown = staticmethod(windows_path)  # type: ignore[method-assign]
    sys.exit(main())
