"""What may pass becomes a short wait; the table of exit statuses says the same in code and in docs."""

from __future__ import annotations

import errno
import random
import re
from pathlib import Path

import pytest

from common.errors import VMwrapperError
from host_agent.wrapper.exit_codes import SENTENCES, Exit
from host_agent.wrapper.failures import LONGEST_DELAY_S, MOST_IN_A_ROW, delay_s, lasting_status, passing_reason
from host_agent.wrapper.tasks import TaskError

DOCS = Path(__file__).parents[3] / "docs" / "exit-codes.md"


def test_delays_grow_to_minutes_and_differ() -> None:
    chance = random.Random(1).random
    delays = [[delay_s(count, chance) for _ in range(50)] for count in range(1, MOST_IN_A_ROW + 1)]
    assert all(12 <= delay <= 18 for delay in delays[0])
    assert 12 <= delay_s(1) <= 18
    assert all(24 <= delay <= 36 for delay in delays[1])
    assert all(len(set(each)) > 3 for each in delays)
    assert all(LONGEST_DELAY_S * 0.8 <= delay <= LONGEST_DELAY_S for each in delays[6:] for delay in each)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out"), "the disk is full (out)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this computer has too little free memory"),
        (MemoryError(), "this computer has too little free memory"),
        (TaskError("the VM did not start", passing=True), "the VM did not start"),
        (TaskError("there is no file"), ""),
        (VMwrapperError("no"), ""),
        (OSError(errno.ENOENT, "No such file"), ""),
        (ZeroDivisionError(), ""),
    ],
)
def test_what_may_pass(error: BaseException, reason: str) -> None:
    assert passing_reason(error) == reason


def test_what_did_not_pass() -> None:
    assert lasting_status(MemoryError()) is Exit.OUT_OF_MEMORY
    assert lasting_status(OSError(errno.ENOMEM, "")) is Exit.OUT_OF_MEMORY
    assert lasting_status(TaskError("")) is Exit.SUB_TASK_FAILURE
    assert lasting_status(OSError(errno.ENOSPC, "")) is Exit.SUB_TASK_FAILURE
    assert lasting_status(ZeroDivisionError()) is Exit.UNKNOWN


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    assert [(int(number), name, text) for number, name, text in rows] == [
        (int(code), code.boinc_name, SENTENCES[code]) for code in Exit
    ]
    assert set(SENTENCES) == set(Exit)


def test_the_numbers_are_boincs() -> None:
    """As `lib/error_numbers.h` and the client's own list have them."""
    boinc = {0: "BOINC_SUCCESS", 195: "EXIT_CHILD_FAILED", 204: "EXIT_UNKNOWN", 205: "EXIT_OUT_OF_MEMORY"}
    boinc |= {206: "EXIT_INIT_FAILURE", 208: "EXIT_SUB_TASK_FAILURE"}
    assert {int(code): code.boinc_name for code in Exit} == boinc


def test_the_delays_in_the_docs_are_those_in_the_code() -> None:
    text = DOCS.read_text()
    assert f"at most {LONGEST_DELAY_S / 60:g} minutes" in text
    assert f"{MOST_IN_A_ROW} times in a row" in text
