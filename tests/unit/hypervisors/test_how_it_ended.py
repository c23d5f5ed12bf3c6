"""A sentence about the end of a QEMU."""

from __future__ import annotations

import pytest

from host_agent.hypervisors.qemu_process import HowItEnded

AGENT_WAS_AWAY = (
    "qemu-system-x86_64: Unable to connect character device monitor: "
    "Failed to connect to '/run/qmp.sock': No such file or directory\n"
)


@pytest.mark.parametrize(
    ("status", "signal", "errors", "sentence"),
    [
        (1, 0, "qemu: could not open disk image\n", "QEMU ended with status 1: qemu: could not open disk image"),
        (0, 9, AGENT_WAS_AWAY, "QEMU was killed by signal 9"),
        (
            0,
            11,
            f"assertion failed\n{AGENT_WAS_AWAY}{AGENT_WAS_AWAY}",
            "QEMU was killed by signal 11: assertion failed",
        ),
        (0, 0, "", "QEMU ended with status 0"),
    ],
)
def test_the_last_words_that_have_to_do_with_it(status: int, signal: int, errors: str, sentence: str) -> None:
    assert str(HowItEnded(status, signal, errors, None)) == sentence
