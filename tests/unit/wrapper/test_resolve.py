"""Soft links, macros and command lines, as BOINC and its wrapper do them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.wrapper import resolve
from host_agent.wrapper.job import Task, TaskKind
from host_agent.wrapper.resolve import (
    Macros,
    application_path,
    command_words,
    environment,
    resolve_name,
    soft_link_target,
    split_command_line,
    unclosed_quote,
)

TASK = Task(kind=TaskKind.TASK, line=1, number=1, application="a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  a  b\tc\n", ["a", "b", "c"]),
        ("'a b' c", ["a b", "c"]),
        ('"a b"c', ["a b", "c"]),
        ("it's fine", ["it's", "fine"]),
        ("'' x", ["", "x"]),
        ("\"it's\" '\"'", ["it's", '"']),
        ("--x='a b'", ["--x='a", "b'"]),
        ("'open end", ["open end"]),
    ],
)
def test_splitting_as_boinc_does(text: str, words: list[str]) -> None:
    assert split_command_line(text) == words


@given(st.text(alphabet="ab'\" \t\n\\"))
def test_splitting_loses_nothing_but_space_and_quotes(text: str) -> None:
    def kept(string: str) -> list[str]:
        return [char for char in string if char not in "'\" \t\n"]

    assert kept("".join(split_command_line(text))) == kept(text)


def test_unclosed_quote() -> None:
    assert unclosed_quote("a 'b")
    assert not unclosed_quote("it's")
    assert not unclosed_quote("")


def link(path: Path, target: str) -> None:
    path.write_text(f"<soft_link>{target}</soft_link>\n")


def test_soft_links(tmp_path: Path) -> None:
    link(tmp_path / "in", "../../projects/example.org/in_1")
    assert resolve_name(tmp_path, "in") == "../../projects/example.org/in_1"
    (tmp_path / "plain").write_text("data")
    assert resolve_name(tmp_path, "plain") == "plain"
    assert resolve_name(tmp_path, "absent") == "absent"


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "../../../etc/passwd", "../../projects/x/../../../etc/passwd", "../../projects/x", "in"],
)
def test_only_boincs_own_links_count(tmp_path: Path, target: str) -> None:
    link(tmp_path / "out", target)
    assert soft_link_target(tmp_path / "out") is None


def test_macros_and_links_stay_one_word(tmp_path: Path) -> None:
    link(tmp_path / "in", "../../projects/my project/in_1")
    task = TASK._replace(
        command_line="-t $NTHREADS $PWD/x ./in ./other boinc_resolve(in) --f=boinc_resolve(in) $GPU_DEVICE_NUM"
    )
    macros = Macros(project_dir="/p q", nthreads=4, device=-1, slot="/s l")
    target = "../../projects/my project/in_1"
    words = ["-t", "4", "/s l/x", target, "./other", target, f"--f={target}", "$GPU_DEVICE_NUM"]
    assert command_words(task, tmp_path, macros) == words
    with_directory = command_words(task._replace(exec_dir="sub"), tmp_path, macros._replace(device=1))
    assert with_directory[3] == str(tmp_path / target)
    assert with_directory[-1] == "1"


@pytest.mark.parametrize(("forward", "slash"), [(False, "\\"), (True, "/")])
def test_slashes_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: bool, slash: str) -> None:
    monkeypatch.setattr(resolve, "WINDOWS", True)
    link(tmp_path / "in", "../../projects/x/in_1")
    task = TASK._replace(command_line="--f=boinc_resolve(in) a/b", forward_slashes=forward)
    assert command_words(task, tmp_path, Macros()) == [
        f"--f={slash.join(('..', '..', 'projects', 'x', 'in_1'))}",
        "a/b",
    ]


def test_names_stay_names_in_a_vm(tmp_path: Path) -> None:
    link(tmp_path / "in", "../../projects/x/in_1")
    task = TASK._replace(virtualmachine="V", command_line="./in boinc_resolve(in) $PWD/a", append_cmdline_args=True)
    assert command_words(task, tmp_path, Macros(slot="/s"), ("--x",)) == ["./in", "in", "./a", "--x"]


def test_application(tmp_path: Path) -> None:
    (tmp_path / "app").write_text("#!/bin/sh\n")
    assert application_path(TASK._replace(application="app"), tmp_path, Macros()) == tmp_path / "app"
    assert application_path(TASK._replace(application="./app"), tmp_path, Macros()) == tmp_path / "./app"
    assert application_path(TASK._replace(application="./none"), tmp_path, Macros()) is None
    found = application_path(TASK._replace(application="sh"), tmp_path, Macros())
    assert found is not None
    assert found.is_absolute()


def test_setenv() -> None:
    task = TASK._replace(setenv=("A=$NTHREADS", "B=x=y", "A=2"))
    assert environment(task, Macros(nthreads=3)) == {"A": "2", "B": "x=y"}
