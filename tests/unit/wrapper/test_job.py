"""job.xml: what is read, every mistake as one sentence, hostile files, and the schema against our own checks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from host_agent.wrapper import job_parse
from host_agent.wrapper.job import Job, JobError, TaskKind, load_job
from host_agent.wrapper.job_tags import JOB_TAGS, TASK_TAGS, Type

ROOT = Path(__file__).parents[3]


def parse(text: str | bytes, strict: bool = False) -> Job:
    data = text.encode() if isinstance(text, str) else text
    return job_parse.parse_job(data, Path("job.xml"), strict)


def one_task(inner: str) -> str:
    return f"<job_desc>\n<task>\n<application>a</application>\n{inner}\n</task>\n</job_desc>"


def sentence(text: str | bytes, strict: bool = False) -> str:
    with pytest.raises(JobError) as caught:
        parse(text, strict)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_seed_example() -> None:
    job = load_job(ROOT / "examples/worker/job.xml", strict=True)
    assert [task.application for task in job.unzip_tasks] == ["tar"]
    worker, summary = job.tasks
    assert worker.kind is TaskKind.TASK
    assert worker.virtualmachine == "CernVM"
    assert worker.copy_app_to_vm
    assert worker.copy_files_to_vm == ("in", "stdin_worker")
    assert worker.copy_files_from_vm == ("out",)
    assert (worker.stdin_filename, worker.stdout_filename) == ("stdin_worker", "stdout_worker")
    assert (worker.command_line, worker.weight) == ("5", 2.0)
    assert not summary.in_vm
    assert job.uses_vm
    assert job.total_weight == 3.0


def test_boincs_own_tags() -> None:
    job = parse(
        """<job_desc>
        <unzip_input><zipfilename>in.zip</zipfilename></unzip_input>
        <task><application>d</application><daemon/></task>
        <task><application>a</application><daemon>0</daemon><exec_dir>sub</exec_dir>
          <setenv>A=1</setenv><setenv>B=x=y</setenv><fraction_done_filename>f</fraction_done_filename>
          <append_cmdline_args/><multi_process>1</multi_process><time_limit>60</time_limit><priority>3</priority>
          <checkpoint_filename>cp</checkpoint_filename><weight> 2.5e1 </weight></task>
        <zip_output><zipfilename>out.zip</zipfilename><filename>.*[.]txt</filename></zip_output>
        <enable_graphics_support/>
        <checkpoint_period>90</checkpoint_period>
        </job_desc>"""
    )
    (task,) = job.tasks
    assert len(job.daemons) == 1
    assert task.setenv == ("A=1", "B=x=y")
    assert (task.exec_dir, task.time_limit, task.priority, task.weight) == ("sub", 60.0, 3, 25.0)
    assert task.append_cmdline_args
    assert task.multi_process
    assert job.unzip_input == ("in.zip",)
    assert job.zip_output is not None
    assert job.zip_output.patterns == (".*[.]txt",)
    assert job.enable_graphics_support
    assert job.checkpoint_period == 90
    assert not job.warnings


def test_empty_tags_are_as_good_as_none() -> None:
    names = [name for name, tag in TASK_TAGS.items() if tag.type is not Type.BOOL and name != "application"]
    empty = "".join(f"<{name}></{name}>" for name in names)
    job = parse("<job_desc><task><application>a</application></task></job_desc>")
    filled = parse(f"<job_desc><task><application>a</application>{empty}</task></job_desc>")
    assert filled.tasks == job.tasks


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("<weight>two</weight>", "job.xml:4: <weight> must be a number above 0, not 'two'"),
        ("<weight>0</weight>", "job.xml:4: <weight> must be a number above 0, not '0'"),
        ("<weight>nan</weight>", "job.xml:4: <weight> must be a number above 0, not 'nan'"),
        ("<time_limit>-1</time_limit>", "job.xml:4: <time_limit> must be a number of seconds, 0 or more, not '-1'"),
        ("<weight>1</weight>\n<weight>2</weight>", "job.xml:5: <weight> is given twice (first on line 4)"),
        ("<setenv>A</setenv>", "job.xml:4: <setenv> must be NAME=VALUE, not 'A'"),
        ("<daemon>maybe</daemon>", "job.xml:4: <daemon> must be 1 or 0, not 'maybe'"),
        ("<cpus>1.5</cpus>", "job.xml:4: <cpus> must be a whole number, 0 or more, not '1.5'"),
        ("<stdin_filename>/etc/passwd</stdin_filename>", "must name a file inside the slot directory"),
        ("<copy_file_to_VM>../../../etc/passwd</copy_file_to_VM>", "must name a file inside the slot directory"),
        ("<copy_file_from_VM>a/../../b</copy_file_from_VM>", "must name a file inside the slot directory"),
        (r"<stdout_filename>C:\x</stdout_filename>", "must name a file inside the slot directory"),
        ("<command_line>a <b>c</b></command_line>", "must be plain text, but has <b> inside"),
        ("<command_line>boinc_resolve(in</command_line>", "boinc_resolve( without its )"),
        ("<virtualmachine>V</virtualmachine><daemon/>", "a <daemon> runs on the host"),
    ],
)
def test_mistakes(inner: str, wanted: str) -> None:
    assert wanted in sentence(one_task(inner))


def test_job_level_mistakes() -> None:
    assert sentence("<job_desc/>") == "job.xml:1: has no <task>: there is nothing to run"
    assert sentence("<jobs/>") == "job.xml:1: the root must be <job_desc>, not <jobs>"
    assert "<task> needs an <application>" in sentence("<job_desc><task/></job_desc>")
    slip = "<job_desc><task>\n<applicaton>x</applicaton></task></job_desc>"
    assert sentence(slip) == "job.xml:2: <task> needs an <application>, and <applicaton> is none"
    with pytest.raises(JobError) as raised:
        parse(slip)
    assert raised.value.hint == "did you mean <application>?"
    assert "job.xml:2: <unzip_task> needs an <application>" in sentence(
        "<job_desc>\n<unzip_task/><task><application>a</application></task></job_desc>"
    )
    assert "runs on the host, not in a VM" in sentence(
        "<job_desc><unzip_task><application>a</application><virtualmachine>V</virtualmachine></unzip_task></job_desc>"
    )
    for period in ("soon", "-1"):
        task = "<task><application>a</application></task>"
        wrong = sentence(f"<job_desc><checkpoint_period>{period}</checkpoint_period>{task}</job_desc>")
        assert f"<checkpoint_period> must be a number of seconds, 0 or more, not '{period}'" in wrong
    assert "must be a regular expression" in sentence(
        "<job_desc><zip_output><zipfilename>a</zipfilename><filename>(</filename></zip_output></job_desc>"
    )
    for text in ("", "not xml", "<job_desc>", b"\x00\xff\xfe", "<job_desc><task></job_desc>"):
        assert "is not well-formed XML" in sentence(text)


def test_unknown_tags_warn_and_are_errors_when_strict() -> None:
    text = one_task("<copy_files_to_VM>x</copy_files_to_VM>\n<colour a='b'><red/></colour>")
    warnings = parse(text).warnings
    assert warnings[0] == ("job.xml:4: <copy_files_to_VM> is not a tag of <task>; did you mean <copy_file_to_VM>?")
    assert "job.xml:5: <colour>" in warnings[1]
    assert "is not a tag of <task>" in sentence(text, strict=True)
    assert "has no effect without a <virtualmachine>" in parse(one_task("<image>x</image>")).warnings[0]
    assert "attributes" in parse(one_task("<weight unit='kg'>1</weight>")).warnings[0]
    assert "outside of its tags" in parse(one_task("loose")).warnings[0]
    assert "quote that is not closed" in parse(one_task("<command_line>'a b</command_line>")).warnings[0]


LAUGHS = '<!DOCTYPE j [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>\n<job_desc>&b;</job_desc>'


def test_hostile_files(tmp_path: Path) -> None:
    assert "has a DOCTYPE or an entity" in sentence(LAUGHS)
    assert "has a DOCTYPE or an entity" in sentence('<!DOCTYPE j SYSTEM "file:///etc/passwd">\n<job_desc/>')
    assert "has a DOCTYPE or an entity" in sentence(
        ('<?xml version="1.0" encoding="UTF-16"?>' + LAUGHS).encode("utf-16")
    )
    deep = "<job_desc>" + "<a>" * 100 + "</a>" * 100 + "</job_desc>"
    assert "nested more than" in sentence(deep)
    assert "well-formed" in sentence("<job_desc>&nothing;</job_desc>")
    big = tmp_path / "job.xml"
    with big.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(JobError, match="104,857,600 bytes; a job file has at most 1,048,576"):
        load_job(big)
    with pytest.raises(JobError, match="cannot be read: No such file"):
        load_job(tmp_path / "none.xml")
    with pytest.raises(JobError, match="not a regular file"):
        load_job(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(JobError, match="not a regular file"):
            load_job(tmp_path / "pipe")


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_job_or_a_job_error(data: bytes) -> None:
    for text in (data, b"<job_desc><task><application>a</application>" + data + b"</task></job_desc>"):
        try:
            parse(text)
        except JobError as error:
            assert str(error).startswith("job.xml")


VALUES = {
    Type.TEXT: ["", "x", "a b"],
    Type.FILE: ["", "x", "a/b"],
    Type.ENV: ["", "A=", "A=b c", "=b", "A"],
    Type.BOOL: ["", "1", "0", "true", "2", "yes"],
    Type.SEED_BOOL: ["", "1", "0", "false", "on"],
    Type.ABOVE_0: ["", "1", "0.5", "+2e3", ".5", "5.", "0", "-1", "two", "NaN", "INF", "1e", "0x1", "1_0", "1e-99"],
    Type.SECONDS: ["", "0", "10", "-1", "1 2", "INF", "abc"],
    Type.COUNT: ["", "0", "12", "+3", "-1", "1.0", "12345678"],
    Type.PRIORITY: ["", "0", "1", "5", "6", "low"],
}


@st.composite
def task_text(draw: st.DrawFn, kind: str) -> str:
    names = draw(st.lists(st.sampled_from([*TASK_TAGS, "unknown"]), max_size=6))
    if draw(st.integers(0, 9)):
        names = [name for name in names if name != "application"] + ["application"]
    if kind != "task":
        names = [name for name in names if name not in ("virtualmachine", "daemon")]
    elif "virtualmachine" in names:  # the two contradict each other, which no schema says
        names = [name for name in names if name != "daemon"]
    lines = []
    for name in draw(st.permutations(names)):
        tag = TASK_TAGS.get(name)
        value = draw(st.sampled_from(VALUES[tag.type] if tag else ["x"]))
        if name == "application":
            value = draw(st.sampled_from(["a", "a", "a", ""]))
        lines.append(f"<{name}>{escape(value)}</{name}>")
    return f"<{kind}>{''.join(lines)}</{kind}>"


@st.composite
def job_text(draw: st.DrawFn) -> str:
    kinds = draw(st.lists(st.sampled_from([*JOB_TAGS, "task", "unknown"]), max_size=5))
    parts = []
    for kind in kinds:
        if kind in ("task", "unzip_task", "VMmanage_task"):
            parts.append(draw(task_text(kind)))
        elif kind == "checkpoint_period":
            parts.append(f"<{kind}>{draw(st.sampled_from(VALUES[Type.SECONDS]))}</{kind}>")
        elif kind == "enable_graphics_support":
            parts.append(f"<{kind}>{draw(st.sampled_from(VALUES[Type.BOOL]))}</{kind}>")
        else:
            inner = draw(st.lists(st.sampled_from(["zipfilename", "filename", "x"]), max_size=3))
            parts.append(f"<{kind}>" + "".join(f"<{name}>n</{name}>" for name in inner) + f"</{kind}>")
    return f"<job_desc>{''.join(parts)}</job_desc>"


@settings(max_examples=600)
@given(job_text())
def test_our_checks_and_the_schema_agree(text: str) -> None:
    try:
        job_parse.parse_job(text.encode(), Path("job.xml"), backstop=False)
        ours = True
    except JobError as error:
        # A job of daemons only has nothing to run: the schema cannot say that.
        if "nothing to run" in str(error) and "<task>" in text:
            return
        if "parallel group" in str(error) or "at the same time" in str(error):  # nor how tasks of a group agree
            return
        ours = False
    root = etree.fromstring(text.encode())
    job_parse.prune(root)
    problem = job_parse.schema_problem(root)
    assert (problem is None) == ours, (problem, text)


def test_schema_and_docs_know_every_tag() -> None:
    schema = job_parse.SCHEMA.read_text("utf-8")
    docs = (ROOT / "docs" / "job-xml.md").read_text("utf-8")
    for name in (*TASK_TAGS, *JOB_TAGS):
        assert f'name="{name}"' in schema
        assert re.search(rf"`<?{name}>?`", docs), f"docs/job-xml.md says nothing about <{name}>"
