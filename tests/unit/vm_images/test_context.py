"""The drive for machines that others made, against what cloud-init and CernVM document."""

from __future__ import annotations

import configparser
import io
import subprocess
from pathlib import Path

import pycdlib
import pytest

from common.errors import ConfigError
from vm_images.context import MOST_USER_DATA, amiconfig_user_data, context_iso


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent.pyz"
    path.write_bytes(b"agent" * 1000)
    return path


def files_of(iso: bytes) -> tuple[str, dict[str, bytes]]:
    """By another implementation than ours; names as Linux shows them."""
    disc = pycdlib.PyCdlib()
    disc.open_fp(io.BytesIO(iso))
    found = {}
    for child in disc.list_children(iso_path="/"):
        if child.is_file():
            name = child.file_identifier().decode()
            content = io.BytesIO()
            disc.get_file_from_iso_fp(content, iso_path=f"/{name}")
            found[name.partition(";")[0].lower()] = content.getvalue()
    label = disc.pvd.volume_identifier.decode().strip()
    disc.close()
    return label, found


def is_a_script(content: bytes) -> bool:
    return subprocess.run(["sh", "-n"], input=content, capture_output=True, check=False).returncode == 0


def test_no_cloud(agent: Path) -> None:
    label, files = files_of(context_iso(agent, b'{"format": 2}', "vm-7"))
    assert label == "cidata"
    assert b"instance-id: vm-7\n" in files["meta-data"]
    assert files["user-data"].startswith(b"#!/bin/sh\n") and is_a_script(files["user-data"])
    assert files["agent.pyz"] == agent.read_bytes()
    assert files["config.json"] == b'{"format": 2}'


def test_cernvm_reads_user_data_from_context_sh(agent: Path) -> None:
    """CernVM's documentation, "Preparing a User-Data CD-ROM Image": these two lines, the data in base64."""
    _, files = files_of(context_iso(agent, None))
    assert "config.json" not in files and "prolog.sh" in files
    shell = ["sh", "-c", '. /dev/stdin; printf "%s\\n%s" "$ONE_CONTEXT_PATH" "$EC2_USER_DATA"']
    done = subprocess.run(shell, input=files["context.sh"], capture_output=True, check=True)
    place, data = done.stdout.split(b"\n")
    assert place == b"/var/lib/amiconfig"
    # `echo $EC2_USER_DATA | base64 -di`, says amiconfig's hepix_functions.
    done = subprocess.run(["base64", "-di"], input=data + b"\n", capture_output=True, check=True)
    assert done.stdout == amiconfig_user_data()
    assert is_a_script(files["context.sh"]) and is_a_script(files["prolog.sh"])


def test_amiconfig_takes_the_script_and_then_the_sections() -> None:
    """The same, "Contextualization scripts": `#!` with /bin/sh.after, an exit statement at its end, then the options.

    amiconfig.sh leaves out blank lines, and takes what is between `#!.*sh.*after` and the first line with `exit`.
    """
    data = amiconfig_user_data().decode("ascii")
    assert len(data) <= MOST_USER_DATA
    lines = [line for line in data.splitlines() if line.strip(" ")]
    assert lines[0] == "#!/bin/sh.after"
    end = next(number for number, line in enumerate(lines) if line.startswith("exit"))
    script, rest = lines[: end + 1], lines[end + 1 :]
    assert script[-1] == "exit 0" and not [line for line in lines[1:] if "#!" in line]
    assert any("agent.pyz --install" in line for line in script)
    assert is_a_script("\n".join(script).encode())
    options = configparser.ConfigParser()
    options.read_string("\n".join(rest))
    assert options["amiconfig"]["plugins"] == "cernvm" and options.has_section("cernvm")


def test_an_agent_with_its_own_python(tmp_path: Path) -> None:
    (tmp_path / "agent.tar.gz").write_bytes(b"x")
    _, files = files_of(context_iso(tmp_path / "agent.tar.gz", None))
    assert files["agent.tgz"] == b"x"
    with pytest.raises(ConfigError, match="cannot be read"):
        context_iso(tmp_path / "none.pyz", None)
