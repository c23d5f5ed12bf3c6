"""Where settings are found, in which order, and what is refused."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from guest_agent import discovery, iso9660
from host_agent.hypervisors.virtualbox.config_iso import config_iso

SETTINGS = json.dumps({"format": 2, "guest": "g", "secret": "s" * 100}).encode()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has none of the places."""
    for name in ("FW_CFG", "BLOCK_DEVICES", "VBOX_GUEST", "CMDLINE", "ROUTES"):
        monkeypatch.setattr(discovery, name, str(tmp_path / name.lower()))
    return tmp_path


def test_nothing_anywhere(nowhere: Path) -> None:
    assert discovery.discover() is None


def test_iso(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.write_bytes(config_iso(SETTINGS))
    assert iso9660.read_file(str(drive), discovery.CONFIG_NAMES, discovery.MOST) == SETTINGS
    assert iso9660.read_file(str(drive), discovery.CONFIG_NAMES, 10) is None
    assert iso9660.read_file(str(drive), ("other",), discovery.MOST) is None


@pytest.mark.parametrize("cut", [0, 100, 16 * 2048 + 50, 20 * 2048 + 40, 21 * 2048])
def test_damaged_iso(tmp_path: Path, cut: int) -> None:
    drive = tmp_path / "drive"
    drive.write_bytes(config_iso(SETTINGS)[:cut])
    found = iso9660.read_file(str(drive), discovery.CONFIG_NAMES, discovery.MOST)
    assert not discovery.usable(found or b"")
    assert iso9660.read_file(str(tmp_path / "none"), discovery.CONFIG_NAMES, discovery.MOST) is None


def test_command_line(nowhere: Path) -> None:
    word = base64.urlsafe_b64encode(SETTINGS).decode().rstrip("=")
    (nowhere / "cmdline").write_text(f"quiet vmwrapper.config={word} audit=0\n")
    assert discovery.discover() == ("kernel command line", SETTINGS)
    (nowhere / "cmdline").write_text("quiet vmwrapper.config=!!\n")
    assert discovery.discover() is None


def test_the_documented_order(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place is taken only while those before it have nothing."""
    having = {name: json.dumps({"format": 2, "from": name}).encode() for name, _ in discovery.SOURCES}
    documented = ["config drive", "fw_cfg", "guest property", "kernel command line", "gateway"]
    assert list(having) == documented
    for gone in range(len(documented)):
        sources = [(name, lambda name=name: having[name]) for name in documented[gone:]]
        empty: list[Any] = [(name, lambda: None) for name in documented[:gone]]
        monkeypatch.setattr(discovery, "SOURCES", tuple(empty + sources))
        assert discovery.discover() == (documented[gone], having[documented[gone]])
    assert discovery.discover(gateway=False) is None


def test_what_is_no_settings_is_passed_over(nowhere: Path) -> None:
    (nowhere / "fw_cfg").write_bytes(bytes(500))
    assert discovery.discover() is None
    (nowhere / "fw_cfg").write_bytes(SETTINGS + bytes(20))
    found = discovery.discover()
    assert found is not None and found[0] == "fw_cfg"


def test_guest_properties_in_pieces(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program that takes, says and ends as VirtualBox's own does, by its source (`getGuestProperty`)."""
    text = base64.b64encode(SETTINGS).decode()
    pieces = [text[place : place + 100] for place in range(0, len(text), 100)]
    for number, piece in enumerate(pieces):
        (nowhere / f"piece-{number}").write_text(piece)
    program = nowhere / "VBoxControl"
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "--nologo guestproperty get" ] || exit 2\nf={nowhere}/piece-${{4##*/}}\n'
        'if [ -e "$f" ]; then echo "Value: $(cat "$f")"; else echo "No value set!"; exit 1; fi\n'
    )
    program.chmod(0o755)
    (nowhere / "vbox_guest").touch()
    monkeypatch.setattr(discovery, "VBOX_CONTROL", str(program))
    assert discovery.discover() == ("guest property", SETTINGS)


def test_gateway(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == discovery.GATEWAY_PATH else 404)
            self.end_headers()
            self.wfile.write(SETTINGS)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setattr(discovery, "GATEWAY_PORT", server.server_port)
            head = "Iface\tDestination\tGateway\tFlags\n"
            (nowhere / "routes").write_text(f"{head}lo\t00000000\t0100007F\t0003\n")
            assert discovery.discover() == ("gateway", SETTINGS)
            monkeypatch.setattr(discovery, "GATEWAY_PATH", "/other")
            (nowhere / "routes").write_text(head)
            assert discovery.discover() is None
        finally:
            server.shutdown()
            thread.join()
