"""A BOINC project for tests, on loopback: master page, scheduler, downloads, upload handler, trickles.

It hands out what the test gives it and keeps what comes back; it knows of BOINC's server what one client needs.
"""

from __future__ import annotations

import hashlib
import html
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import attrs

from .signing import Key

PLATFORM = "x86_64-pc-linux-gnu"
APP = "vmwrapper"
ACCOUNT = "0123456789abcdef0123456789abcdef"


@attrs.frozen
class AppVersion:
    """Application files: name in the slot to contents; the first is the main program."""

    number: int
    files: Mapping[str, bytes]
    plan_class: str = ""


@attrs.frozen
class Installed:
    """An application version as `vmctl bundle` writes it, signatures and all."""

    number: int
    directory: Path
    plan_class: str = ""

    def files(self) -> list[ElementTree.Element]:
        return ElementTree.parse(self.directory / "version.xml").findall("file")

    @property
    def api_version(self) -> str:
        return ElementTree.parse(self.directory / "version.xml").findtext("api_version", "")


@attrs.define
class Work:
    """A workunit with its one result."""

    name: str
    version: int
    inputs: Mapping[str, bytes]  # name in the slot to contents
    outputs: tuple[str, ...] = ()  # names in the slot
    command_line: str = ""
    fpops_est: float = 1e10
    copied: tuple[str, ...] = ()  # inputs that the client copies into the slot

    @property
    def result(self) -> str:
        return f"{self.name}_0"

    def output(self, name: str) -> str:
        """The physical name of an output file."""
        return f"{self.result}_{self.outputs.index(name)}"


@attrs.frozen
class Report:
    """A result as the client reported it."""

    name: str
    exit_status: int
    state: int
    cpu_s: float
    elapsed_s: float
    stderr: str
    text: str


class Project:
    """The server; `url` is what a client attaches to."""

    def __init__(self) -> None:
        self.key = Key()
        self.versions: dict[int, AppVersion | Installed] = {}
        self.uploads: dict[str, bytes] = {}
        self.upload_times: dict[str, float] = {}
        self.reports: dict[str, Report] = {}
        self.trickles: list[tuple[str, str]] = []  # result, text
        self.requests = 0
        self._queue: list[Work] = []
        self._trickles_down: list[tuple[str, str]] = []
        self._files: dict[str, bytes | Path] = {}
        self._changed = threading.Condition()
        project = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(*project._get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                self._answer(*project._post(self.path, body))

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "text/html" if status == 200 else "text/plain")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/test/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def add_version(self, version: AppVersion) -> None:
        """Make an application version known; work may then name it."""
        with self._changed:
            self.versions[version.number] = version
            for name, data in version.files.items():
                self._files[self.app_file(version, name)] = data

    def install(self, version: Installed) -> None:
        """What a project's `update_versions` does with a bundle."""
        with self._changed:
            self.versions[version.number] = version
            for file in version.files():
                name = file.findtext("physical_name", "")
                self._files[name] = version.directory / name

    @staticmethod
    def app_file(version: AppVersion, name: str) -> str:
        """The physical name of an application file: with its version, as BOINC wants it."""
        path = PurePosixPath(name)
        return f"{path.stem}_{version.number}{version.plan_class}{path.suffix}"

    def send(self, work: Work) -> Work:
        """Queue a result for the next request of the client."""
        with self._changed:
            for name, data in work.inputs.items():
                self._files[f"{work.name}_{name}"] = data
            self._queue.append(work)
        return work

    def send_trickle_down(self, result: str, text: str) -> None:
        """Queue a message for a job that runs."""
        with self._changed:
            self._trickles_down.append((result, text))

    def wait(self, what: Callable[[], object], deadline_s: float, step: Callable[[], None] | None = None) -> bool:
        """Until something is true here. `step` is called about twice a second."""
        until = time.monotonic() + deadline_s
        while True:
            with self._changed:
                if what():
                    return True
                self._changed.wait(0.5)
            if step is not None:
                step()
            if time.monotonic() > until:
                return bool(what())

    def _get(self, path: str) -> tuple[int, bytes]:
        if path == "/test/":
            return 200, f"<html>\n<!-- <scheduler>{self.url}scheduler</scheduler> -->\n</html>\n".encode()
        name = path.removeprefix("/test/download/")
        with self._changed:
            data = self._files.get(name)
        if isinstance(data, Path):
            data = data.read_bytes()
        return (200, data) if data is not None else (404, b"there is no such file")

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        with self._changed:
            try:
                if path == "/test/upload":
                    return 200, self._upload(body)
                if path == "/test/scheduler":
                    return 200, self._schedule(body.decode("utf-8", "replace")).encode()
                return 404, b""
            finally:
                self._changed.notify_all()

    def _upload(self, body: bytes) -> bytes:
        head, found, data = body.partition(b"<data>\n")
        answer = "<status>0</status>"
        if found:
            name = _text(head.decode(), "name")
            offset = int(float(_text(head.decode(), "offset") or 0))
            self.uploads[name] = self.uploads.get(name, b"")[:offset] + data
            self.upload_times[name] = time.monotonic()
        else:
            name = _text(body.decode(), "get_file_size")
            answer += f"<file_size>{len(self.uploads.get(name, b''))}</file_size>"
        return f"<data_server_reply>{answer}</data_server_reply>".encode()

    def _schedule(self, request: str) -> str:
        self.requests += 1
        parts = [
            "<scheduler_version>720</scheduler_version>",
            f"<master_url>{self.url}</master_url>",
            "<request_delay>0.1</request_delay>",
            "<project_name>Test project</project_name>",
            "<userid>1</userid><user_name>tester</user_name><hostid>1</hostid>",
        ]
        if "<code_sign_key>" not in request:
            parts.append(f"<code_sign_key>\n{self.key.public()}</code_sign_key>")
        for block in re.findall(r"<result>(.*?)</result>", _without(request, "other_results"), re.DOTALL):
            report = _report(block)
            self.reports[report.name] = report
            parts.append(f"<result_ack><name>{report.name}</name></result_ack>")
        for block in re.findall(r"<msg_from_host>(.*?)</msg_from_host>", request, re.DOTALL):
            self.trickles.append((_text(block, "result_name"), block.partition("</time>")[2].strip()))
            parts.append("<message_ack/>")
        for result, text in self._trickles_down:
            parts.append(
                f"<trickle_down><result_name>{result}</result_name><time>{int(time.time())}</time>\n{text}\n</trickle_down>"
            )
        self._trickles_down.clear()
        if self._queue:
            parts += self._hand_out(self._queue)
            self._queue = []
        return "<scheduler_reply>\n" + "\n".join(parts) + "\n</scheduler_reply>\n"

    def _hand_out(self, queue: list[Work]) -> list[str]:
        parts = [f"<app><name>{APP}</name><user_friendly_name>VMwrapper</user_friendly_name></app>"]
        for number in sorted({work.version for work in queue}):
            parts += self._version_parts(self.versions[number])
        for work in queue:
            parts += [self._file_info(f"{work.name}_{name}", data) for name, data in work.inputs.items()]
            parts += [self._output_info(work.output(name)) for name in work.outputs]
        for work in queue:
            version = self.versions[work.version]
            inputs = "".join(
                _file_ref(f"{work.name}_{name}", name, "<copy_file/>" if name in work.copied else "")
                for name in work.inputs
            )
            outputs = "".join(_file_ref(work.output(name), name) for name in work.outputs)
            parts.append(
                f"<workunit><name>{work.name}</name><app_name>{APP}</app_name>"
                f"<command_line>{html.escape(work.command_line)}</command_line>"
                f"<rsc_fpops_est>{work.fpops_est}</rsc_fpops_est><rsc_fpops_bound>1e18</rsc_fpops_bound>"
                f"<rsc_memory_bound>1e8</rsc_memory_bound><rsc_disk_bound>1e10</rsc_disk_bound>{inputs}</workunit>"
            )
            parts.append(
                f"<result><name>{work.result}</name><wu_name>{work.name}</wu_name>"
                f"<report_deadline>{int(time.time()) + 864000}</report_deadline><platform>{PLATFORM}</platform>"
                f"<version_num>{version.number}</version_num><plan_class>{version.plan_class}</plan_class>"
                f"<report_immediately/>{outputs}</result>"
            )
        return parts

    def _version_parts(self, version: AppVersion | Installed) -> list[str]:
        parts, refs = [], []
        if isinstance(version, Installed):
            for file in version.files():
                name, logical = file.findtext("physical_name", ""), file.findtext("logical_name", "")
                path = version.directory / name
                signature = path.with_name(f"{name}.sig").read_text()
                parts.append(self._file_info(name, path.read_bytes(), signature, bool(path.stat().st_mode & 0o100)))
                more = [f"<{tag}/>" for tag in ("main_program", "copy_file") if file.find(tag) is not None]
                refs.append(_file_ref(name, logical, "".join(more)))
            return [*parts, _app_version(version, version.api_version, refs)]
        for position, (name, data) in enumerate(version.files.items()):
            physical = self.app_file(version, name)
            parts.append(self._file_info(physical, data, self.key.sign(data), executable=True))
            refs.append(_file_ref(physical, name, "<main_program/>" if position == 0 else ""))
        return [*parts, _app_version(version, "8.0.0", refs)]

    def _file_info(self, name: str, data: bytes, signature: str = "", executable: bool = False) -> str:
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        more = "<executable/>" if executable else ""
        more += f"<file_signature>\n{signature}</file_signature>" if signature else ""
        return (
            f"<file_info><name>{name}</name><url>{self.url}download/{name}</url>{more}"
            f"<md5_cksum>{md5}</md5_cksum><nbytes>{len(data)}</nbytes></file_info>"
        )

    def _output_info(self, name: str) -> str:
        return (
            f"<file_info><name>{name}</name><generated_locally/><upload_when_present/>"
            f"<max_nbytes>1e8</max_nbytes><upload_url>{self.url}upload</upload_url></file_info>"
        )


def _app_version(version: AppVersion | Installed, api_version: str, refs: list[str]) -> str:
    """Without an API version the client makes no shared memory."""
    return (
        f"<app_version><app_name>{APP}</app_name><version_num>{version.number}</version_num>"
        f"<platform>{PLATFORM}</platform><plan_class>{version.plan_class}</plan_class>"
        f"<avg_ncpus>1</avg_ncpus><flops>1e9</flops><api_version>{api_version}</api_version>{''.join(refs)}</app_version>"
    )


def _file_ref(name: str, open_name: str, more: str = "") -> str:
    opened = f"<open_name>{open_name}</open_name>" if open_name else ""
    return f"<file_ref><file_name>{name}</file_name>{opened}{more}</file_ref>"


def _text(block: str, tag: str) -> str:
    match = re.search(rf"<{tag}>\s*([^<]*?)\s*</{tag}>", block)
    return match[1] if match else ""


def _without(text: str, tag: str) -> str:
    return re.sub(rf"<{tag}>.*?</{tag}>", "", text, flags=re.DOTALL)


def _report(block: str) -> Report:
    stderr = re.search(r"<stderr_txt>(.*?)</stderr_txt>", block, re.DOTALL)
    return Report(
        name=_text(block, "name"),
        exit_status=int(_text(block, "exit_status") or 0),
        state=int(_text(block, "state") or 0),
        cpu_s=float(_text(block, "final_cpu_time") or 0),
        elapsed_s=float(_text(block, "final_elapsed_time") or 0),
        stderr=html.unescape(stderr[1]) if stderr else "",
        text=block,
    )
