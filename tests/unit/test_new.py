"""`vmctl new`: what it writes is a job that vmctl and vmwrapper take."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from host_agent.bundle.content import sort_job
from host_agent.vmctl.main import main
from host_agent.wrapper.job import load_job
from host_agent.wrapper.main import main as vmwrapper


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(*words: str) -> int:
    return main(["new", "myapp", *words])


def test_a_job_of_a_virtual_machine() -> None:
    Path("data.csv").write_text("1,2")
    Path("model").write_text("my own")
    assert new("--command", "./model --steps 1000", "--input", "data.csv", "--output", "out.csv") == 0
    [task] = load_job(Path("myapp/job.xml"), strict=True).tasks
    assert (task.virtualmachine, task.image, task.application) == ("myapp", "debian-minimal", "./model")
    assert (task.command_line, task.copy_files_to_vm) == ("--steps 1000", ("data.csv",))
    assert task.copy_files_from_vm == ("out.csv",)
    assert Path("myapp/data.csv").read_text() == "1,2"
    assert Path("myapp/model").read_text() == "my own"
    content = sort_job(Path("myapp"), ["data.csv"], with_image=False)
    assert content.outputs == ("out.csv", "stdout.txt")
    assert content.notes == ()
    readme = Path("myapp/README.md").read_text()
    assert "vmctl bundle myapp --version 1.00 --project PROJECT --input data.csv --output out.csv" in readme
    assert main(["check", "myapp/job.xml"]) == 0


def test_a_job_on_the_host_runs_as_its_readme_says() -> None:
    """With the stand-in for the program, which is there from the first minute."""
    assert new("--command", "./model 'two words' 3", "--image", "none") == 0
    assert vmwrapper_in("myapp") == 0
    assert (
        Path("myapp/stdout.txt")
        .read_text()
        .endswith("model was called with: two words 3\nput what your program reads here\n")
    )


def vmwrapper_in(directory: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return vmwrapper([])


def test_a_program_of_the_image() -> None:
    assert new("--command", "python3 -c 'print(1)' < &", "--input", "a.py") == 0
    text = Path("myapp/job.xml").read_text()
    assert "<application>python3</application>" in text
    assert "<command_line>-c 'print(1)' &lt; &amp;</command_line>" in text
    assert "copy_app_to_VM" not in text
    assert not Path("myapp/python3").exists()


def test_the_stand_in_is_a_script_without_faults() -> None:
    assert new("--command", "./model", "--input", "raw.dat") == 0
    subprocess.run(["sh", "-n", "myapp/model"], check=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--command", ""], "is not a command line"),
        (["--command", "./model 'open"], "is not a command line"),
        (["--command", "../model"], "is not the name of a program"),
        (["--command", "./m", "--output", "a/b"], "'a/b' is not a plain file name"),
        (["--command", "./m", "--input", "x", "--output", "x"], "x is named twice"),
    ],
)
def test_what_cannot_be_written(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(*words) == 1
    assert sentence in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_nothing_is_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    Path("myapp").mkdir()
    assert new("--command", "./model") == 1
    assert "exists already" in capsys.readouterr().err
    assert not list(Path("myapp").iterdir())
