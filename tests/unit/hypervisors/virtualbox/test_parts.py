"""The VirtualBox driver's parts that need no VirtualBox."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pycdlib
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from common.broker_address import BrokerAddress, Credentials, Tls
from common.config import GuestConfig
from common.errors import ConfigError
from host_agent.hypervisors.loopback_ports import OwnUserOnly, owner_of, tell_guest
from host_agent.hypervisors.virtualbox import differences, pyvbox, requirements
from host_agent.hypervisors.virtualbox.causes import CAUSES, explain
from host_agent.hypervisors.virtualbox.config_iso import config_iso
from host_agent.hypervisors.virtualbox.console import KEEP, LIMIT, BoundedFile, Console, console_place
from host_agent.hypervisors.virtualbox.record import Record
from host_agent.hypervisors.virtualbox.settings import Settings
from host_agent.process_identity import identity_of


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 65536])
def test_config_iso_is_read_by_another_implementation(size: int) -> None:
    content = os.urandom(size)
    disc = pycdlib.PyCdlib()
    disc.open_fp(io.BytesIO(config_iso(content)))
    assert disc.pvd.volume_identifier.rstrip() == b"VMWRAPPER"
    found = io.BytesIO()
    disc.get_file_from_iso_fp(found, iso_path="/CONFIG.JSON;1")
    assert found.getvalue() == content
    disc.close()


def test_console_file_is_bounded_and_private(tmp_path: Path) -> None:
    file = BoundedFile(tmp_path / "console.log")
    whole = b""
    for number in range(3000):
        line = b"line %d of many\n" % number * 10
        whole += line
        file.write(line)
        assert (tmp_path / "console.log").stat().st_size <= LIMIT
    kept = file.tail(LIMIT)
    assert len(kept) >= KEEP
    assert whole.endswith(kept)
    assert (tmp_path / "console.log").stat().st_mode & 0o777 == 0o600
    file.write(b"x" * (3 * LIMIT))
    assert file.tail(LIMIT) == b"x" * KEEP


def test_guest_is_told_the_real_places(tmp_path: Path) -> None:
    """The settings are those that host agents write, and guest agents read."""
    brokers = (BrokerAddress("10.0.2.2", 61613), BrokerAddress("example.org", 61613, Tls("ca", "example.org")))
    proxy = "http://10.0.2.2:61615"
    config = GuestConfig("g", "h", "61613", brokers, Credentials("l", "p"), "http://10.0.2.2:61614", "s", proxy=proxy)
    places = {61613: 40001, 61614: 40002, 61615: 40003}
    (tmp_path / "told").write_bytes(tell_guest(config.to_json(), "10.0.2.2", "192.168.56.1", places))
    told = GuestConfig.load(tmp_path / "told")
    assert told.brokers == (BrokerAddress("192.168.56.1", 40001), brokers[1])
    assert told.files == "http://192.168.56.1:40002"
    assert told.name == "61613"
    assert told.proxy == "http://192.168.56.1:40003"
    assert tell_guest(b"not json", "10.0.2.2", "10.0.2.2", {1: 2}) == b"not json"


TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:9C41 0100007F:EEAD 01 00000000:00000000 00:00000000 00000000  1001        0 12345 1
   1: 0100007F:EEAD 0100007F:9C41 01 00000000:00000000 00:00000000 00000000     0        0 12346 1
"""


def test_owner_of_a_connection() -> None:
    assert owner_of(0x9C41, TABLE) == 1001
    assert owner_of(0xEEAD, TABLE) == 0
    assert owner_of(1, TABLE) is None


def test_connections_of_other_users_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from host_agent.hypervisors import loopback_ports

    (tmp_path / "tcp").write_text(TABLE)
    monkeypatch.setattr(loopback_ports, "SOCKETS", tmp_path / "tcp")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    factory = OwnUserOnly(Factory.forProtocol(Protocol))
    assert factory.buildProtocol(IPv4Address("TCP", "127.0.0.1", 0x9C41)) is None
    assert factory.buildProtocol(IPv4Address("TCP", "127.0.0.1", 0xEEAD)) is not None


def test_causes_are_told_with_virtualbox_s_own_words() -> None:
    for cause in CAUSES:
        for sign in cause.signs:
            sentence, hint = explain("starting the machine", f"The VM session was closed\n ({sign})")
            assert cause.sentence in sentence
            assert f"The VM session was closed ({sign})" in sentence
            assert hint == cause.hint
    assert explain("pausing", "") == ("pausing: VirtualBox says: no reason given", "")
    signs = [sign for cause in CAUSES for sign in cause.signs]
    assert len(signs) == len(set(signs))


def test_hyper_v_and_held_vt_x_have_sentences_of_their_own() -> None:
    assert "Hyper-V" in explain("starting", "(VERR_NEM_NOT_AVAILABLE)")[0]
    assert "held by another hypervisor" in explain("starting", "VT-x is being used (VERR_VMX_IN_VMX_ROOT_MODE)")[0]


def test_an_unknown_shape_is_named() -> None:
    class Vbox:
        def createMachine(self, one: str) -> None: ...

    with pytest.raises(NotImplementedError, match="another way to create a machine"):
        differences.create_machine(Vbox(), 0, "file", "name", [], "Linux", "")


def test_settings() -> None:
    assert Settings.from_environment({}) == Settings("nat", 100)
    chosen = {"VMWRAPPER_VIRTUALBOX_NETWORK": "hostonly:vboxnet0", "VMWRAPPER_VIRTUALBOX_CPU_CAP": "50"}
    assert Settings.from_environment(chosen) == Settings("hostonly:vboxnet0", 50)
    for wrong in ({"VMWRAPPER_VIRTUALBOX_NETWORK": "bridged"}, {"VMWRAPPER_VIRTUALBOX_CPU_CAP": "0"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Settings.from_environment(wrong)


def test_record(tmp_path: Path) -> None:
    assert Record.read(tmp_path) is None
    record = Record.new()
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert record.held()
    assert not Record(record.machine, [os.getpid(), 1.0]).held()
    assert not Record(record.machine, None).held()
    assert record.owner == identity_of(os.getpid())
    (tmp_path / "virtualbox.json").write_text('{"machine": "../../etc", "owner": null, "ports": {}, "cpu_before": 0}')
    assert Record.read(tmp_path) is None


class TestRequirements:
    def test_kernel_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = requirements.kernel_driver(tmp_path / "vboxdrv")
        assert not missing.met
        assert missing.fatal
        assert "not loaded" in missing.found
        device = tmp_path / "device"
        device.touch(mode=0o660)
        assert requirements.kernel_driver(device).met
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        refused = requirements.kernel_driver(device)
        assert not refused.met
        assert re.match(r"usermod -aG \S+ \S+, then log in again", refused.remedy)

    def test_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import grp

        def group(name: str) -> grp.struct_group:
            return grp.struct_group((name, "x", 99999, []))

        monkeypatch.setattr(grp, "getgrnam", group)
        monkeypatch.setattr(os, "getuid", lambda: 1000)
        outside = requirements.group_of_users()
        assert not outside.met
        assert not outside.fatal
        assert "usermod -aG vboxusers" in outside.remedy
        monkeypatch.setattr(os, "getgroups", lambda: [99999])
        assert requirements.group_of_users().met

    @pytest.mark.parametrize(
        ("flags", "modules", "met", "words"),
        [
            ("fpu vmx sse", "kvm_intel 372736 0 - Live\n", True, "is there"),
            ("fpu svm", "vboxdrv 500000 2 vboxnetadp, Live\n", True, "is there"),
            ("fpu vmx", "kvm 1 1 kvm_intel,\nkvm_intel 372736 4 - Live\n", False, "held by KVM"),
            ("fpu sse", "", False, "offers none"),
        ],
    )
    def test_virtualisation(self, tmp_path: Path, flags: str, modules: str, met: bool, words: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
        (tmp_path / "modules").write_text(modules)
        host = requirements.Host(processor=tmp_path / "cpuinfo", modules=tmp_path / "modules")
        found = requirements.virtualisation(host)
        assert found.met is met
        assert words in found.found


class ComError(Exception):
    """As pywin32 raises it, by the same names; tests/windows has a real one."""

    def __init__(self, hresult: int, strerror: str, excepinfo: tuple[object, ...] | None, argerror: None) -> None:
        super().__init__(hresult, strerror, excepinfo, argerror)
        self.hresult, self.strerror, self.excepinfo, self.argerror = hresult, strerror, excepinfo, argerror


def test_an_error_of_com_is_told_with_virtualbox_s_words_and_code() -> None:
    told = (0, "SessionMachine", "The machine is locked by a session", None, 0, -2135228409)
    error = ComError(-2147352567, "Exception occurred.", told, None)
    assert pyvbox.words(error) == "The machine is locked by a session"
    assert pyvbox.status(error) == 0x80BB0007
    gone = ComError(-2147023174, "The RPC server is unavailable.", None, None)
    assert pyvbox.status(gone) in pyvbox.DEAD
    assert "RPC server" in pyvbox.words(gone)


def test_on_windows_and_macos_the_bindings_are_looked_for_where_installers_put_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VBOX_SDK_PATH", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("VBOX_MSI_INSTALL_PATH", "D:/VirtualBox")
    assert Path("D:/VirtualBox/sdk/install") in pyvbox._places()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert Path("/Applications/VirtualBox.app/Contents/MacOS/sdk/installer/python/vboxapi/src") in pyvbox._places()


@ensureDeferred
async def test_on_windows_a_console_is_a_named_pipe_that_may_not_be_there_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A FIFO stands for it."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert console_place(tmp_path, "g-1") == "\\\\.\\pipe\\vmwrapper-g-1"
    console = Console(reactor, str(tmp_path / "pipe"), tmp_path / "console.log")
    console.connect()
    os.mkfifo(tmp_path / "pipe")
    await deferToThread((tmp_path / "pipe").write_bytes, b"a guest's first words\r\n")
    for _ in range(3000):
        if console.tail(1):
            break
        await deferLater(reactor, 0.01)  # nothing says that a thread has handed its bytes over
    assert console.tail(1) == "a guest's first words"
    console.close()
