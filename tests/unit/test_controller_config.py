"""HostConfig.cfg of the first VM controller: each key, and every mistake one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from host_agent.controller_config import ControllerConfig

WHOLE = """\
#this config file follows the syntax defined at Python's ConfigParser module
[Broker]
host=localhost
port=61999
username=boincvm
password=pa%ss

[Host]
chirp_path=./cctools/bin
xmlrpc_listen_on=127.0.0.1
xmlrpc_port=8080
#in seconds
vm_gc_grace=30
network_interface=vboxnet0

[Hypervisor]
hypervisor=VirtualBox
hypervisor_helpers_path=

[coilmq]
listen_addr = 0.0.0.0

[Guests]
Boincvm-g1=one
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "HostConfig.cfg"
    path.touch(0o600)
    return path


def load(file: Path, text: str) -> ControllerConfig:
    file.write_text(text)
    return ControllerConfig.load(file)


def test_every_key(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(file, WHOLE)
    broker = config.broker
    assert broker is not None
    assert (broker.kind, str(broker.brokers[0]), broker.host.login) == ("activemq", "localhost:61999", "boincvm")
    assert broker.host.passcode == "pa%ss"
    assert broker.guests == {"Boincvm-g1": "one"}
    assert (config.hypervisor, config.xmlrpc, config.vm_gc_grace) == ("virtualbox", "127.0.0.1:8080", 30.0)
    assert config.chirp_path == tmp_path / "cctools" / "bin"
    assert len(config.remarks) == 1
    assert "network_interface" in config.remarks[0]


def test_nothing_is_required(file: Path) -> None:
    assert load(file, "") == ControllerConfig()


def test_a_broker_that_asks_nobody_who_they_are(file: Path) -> None:
    """As ActiveMQ 5.2 was installed; logins only name the queues."""
    broker = load(file, "[Broker]\nhost=localhost\nport=61613\nusername=\npassword=\n").broker
    assert broker is not None
    assert broker.host.login not in broker.guests
    assert len(broker.guests) == 8


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[Broker]\nhost=localhost\nusername=u\npassword=p\n", r"no \[Guests\]"),
        ("[Broker]\nhost=broker.example\n", "another machine's"),
        ("[Broker]\nhost=localhost\nport=x\n", "invalid literal"),
        ("[Broker]\nhost=localhost\nkind=kafka\n", "kafka"),
        ("[Hypervisor]\nhypervisor=KVM\n", "hypervisor is 'kvm', not one of"),
        ("[Host]\nvm_gc_grace=-1\n", "vm_gc_grace is -1"),
        ("[Host]\nvm_gc_grace=nan\n", "vm_gc_grace is nan"),
        ("host=localhost\n", "cannot be read"),
    ],
)
def test_mistakes(file: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(file, text)


def test_passcodes_are_the_owners_alone(file: Path) -> None:
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        load(file, WHOLE)
    load(file, "[Hypervisor]\nhypervisor=QEMU\n")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ControllerConfig.load(tmp_path / "none")
