#!/usr/bin/env python3
"""A BOINC application that uses every way to talk to its client and its project, and writes down what came back."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from host_agent.wrapper.boinc.application import Application, TemporaryExitError, run


def until(app: Application, what: Callable[[], object]) -> None:
    """Step until it is so; the client stays served meanwhile."""
    end = time.monotonic() + 240
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came: {what}")
        app.step(0.5)
        time.sleep(0.1)


def main(app: Application) -> int:
    if not Path("been-here").exists():
        Path("been-here").touch()
        raise TemporaryExitError(1, "not in the mood")
    runtime = app.runtime
    runtime.web_graphics_url("http://127.0.0.1:8080/picture")
    runtime.remote_desktop("127.0.0.1:5900")
    app.resolve("early").write_text("early\n")
    runtime.upload_file("early")
    until(app, lambda: runtime.upload_status("early") is not None)
    runtime.send_trickle_up("question", "<text>is anybody there?</text>\n")
    until(app, runtime.trickles_down)
    [answer] = runtime.trickles_down()
    lines = [
        f"upload {runtime.upload_status('early')}",
        f"answer {' '.join(answer.text.split())}",
        f"init {app.data.app_name} {app.data.app_version} {app.data.wu_name} {app.data.result_name}",
        f"user {app.data.user_name} host {app.data.host_id}",
        f"files {' '.join(app.data.app_files)}",
        f"client {app.data.client_version}",
    ]
    runtime.trickle_done(answer)
    app.resolve("out").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
