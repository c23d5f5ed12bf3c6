"""Every pair of views has its rule, and the page of the protocol says the same."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from host_agent import reconcile
from host_agent.reconcile import RULES, Action, GuestView, HostView


def test_every_pair_has_a_rule() -> None:
    assert set(RULES) == set(itertools.product(HostView, GuestView))


def test_the_page_of_the_protocol_has_the_same_table() -> None:
    page = (Path(reconcile.__file__).parents[1] / "docs" / "protocol.md").read_text("utf-8")
    heading = re.search(r"^\| host \\ guest \|(.*)\|$", page, re.MULTILINE)
    assert heading is not None
    columns = [GuestView(word.strip()) for word in heading.group(1).split("|")]
    found = {}
    for view in HostView:
        row = re.search(rf"^\| {view.value} \|(.*)\|$", page, re.MULTILINE)
        assert row is not None
        cells = [Action(word.strip()) for word in row.group(1).split("|")]
        found.update({(view, column): cell for column, cell in zip(columns, cells, strict=True)})
    assert found == RULES


def test_nothing_is_run_that_may_have_had_an_effect() -> None:
    asked = {pair for pair, action in RULES.items() if action is Action.ASK}
    assert asked == {(HostView.ASKED, GuestView.ABSENT)}
