"""How a task in a VM speaks with the host agent: what it says when a call fails, and whether waiting may help."""

from __future__ import annotations

from ..control_client import ControlError

DOING = {
    "vms": "the host agent's virtual machines could not be listed",
    "start_vm": "the virtual machine could not be started",
    "stop_vm": "the virtual machine of before could not be removed",
    "resume_vm": "the virtual machine could not be resumed",
    "put": "a file could not be copied into the virtual machine",
    "run": "the program could not be run in the virtual machine",
    "get": "a file could not be copied out of the virtual machine",
}

UNDONE = "undone"  # the code of what a VM that went back to a checkpoint knows nothing of
VM_EXISTS = "vm_exists"
POWERED_OFF = "was powered off by its guest"  # in the host agent's sentence about such a VM

# The VM is of no more use, and a new one may be.
VM_FAILED = frozenset({"vm_failed", "agent_silent", "no_vm"})

# By call: the host agent's codes for what may be different in a while. A file that a program did not make is not.
_PASSING = {
    "": frozenset({"no_room", "vm_failed", "agent_silent", "no_vm", "internal", "deadline", "bad_answer"}),
    "put": frozenset({"vm_failed", "agent_silent", "no_vm", "internal", "deadline", "bad_answer", "copy_failed"}),
}


def sentence(call: str, what: str, error: ControlError) -> str:
    """What could not be done, and why."""
    return f"{DOING[call]}{f' ({what})' if what else ''}: {error}"


def is_passing(call: str, error: ControlError) -> bool:
    """Whether it may help to try again in a while."""
    return error.code in _PASSING.get(call, _PASSING[""])


def number(value: object) -> float:
    """A number of an answer; 0 when it is none."""
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0
