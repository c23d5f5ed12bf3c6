"""Run states in which QEMU stands still for good, and what has become of the guest then."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .qemu_options import emulated, how_it_runs
from .refusal import one_line

INTERNAL_ERROR = "internal-error"
# "shutdown" is none of them: a guest that powers itself off ends its QEMU, as we start it. Nor is "io-error": when the
# disk has room again the guest goes on.
FOR_GOOD = (INTERNAL_ERROR, "guest-panicked")

# In the middle of what QEMU says there, which ends with the processor's registers.
_CAUSE = re.compile(r"\b(kvm|hvf|whpx)\b|emulation failure|hardware (error|reason)", re.IGNORECASE)


def accelerator_words(status: str, accelerator: Sequence[str], said: Sequence[str]) -> str:
    """QEMU's words about an accelerator that did not know how to go on; empty when it was not that."""
    if status != INTERNAL_ERROR or emulated(accelerator):
        return ""
    return one_line(", ".join([line for line in said if _CAUSE.search(line)][:2])) or "internal error"


def sentence(status: str, accelerator: tuple[str, ...], said: Sequence[str]) -> str:
    """For people."""
    if status != INTERNAL_ERROR:
        return "the guest's kernel failed or restarted"
    if words := accelerator_words(status, accelerator, said):
        return f"{how_it_runs(accelerator).split()[-1]} gave up on the guest ({words}); VMs are emulated from now on"
    return f"QEMU gave up on the guest ({one_line(' '.join(said[-1:])) or 'internal error'})"
