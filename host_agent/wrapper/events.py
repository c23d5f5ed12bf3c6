"""The wrapper's event loop: one selector that wakes for sockets, for the end of a child and for signals.

It only wakes; who woke up looks for itself what happened. So a missed or a double wake-up does no harm.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Callable
from typing import Any


class Events:
    """Made once, in the main thread; `close()` gives the signals back."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_up, self._wake_up_end = socket.socketpair()
        for end in (self._wake_up, self._wake_up_end):
            end.setblocking(False)
        self._selector.register(self._wake_up, selectors.EVENT_READ, self._drain)
        self._old_fd = signal.set_wakeup_fd(self._wake_up_end.fileno(), warn_on_full_buffer=False)
        self._old_handlers: dict[int, Any] = {}
        self.quit_signal = ""  # the name of the signal that asked us to quit
        for name in ("SIGTERM", "SIGINT", "SIGBREAK", "SIGHUP"):
            number = getattr(signal, name, None)
            # An ignored SIGHUP (nohup) stays ignored.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._old_handlers[number] = signal.signal(number, self._quit)

    def watch(self, file: Any, callback: Callable[[], None]) -> None:
        """Call back whenever `file` (a descriptor or something with fileno()) can be read."""
        self._selector.register(file, selectors.EVENT_READ, callback)

    def unwatch(self, file: Any) -> None:
        """Forget a file; before it is closed."""
        self._selector.unregister(file)

    def watch_until(self, file: Any, callback: Callable[[], None]) -> Callable[[], None]:
        """`watch`, ended by the function that is returned; ending it twice is ending it once."""
        watched = True

        def end() -> None:
            nonlocal watched
            if watched:
                watched = False
                self.unwatch(file)

        self.watch(file, callback)
        return end

    def watch_child(self, pid: int) -> Callable[[], None]:
        """Wake up when this child ends; the returned function ends the watch."""
        if hasattr(os, "pidfd_open"):
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:  # an old kernel, or a sandbox
                descriptor = -1
            if descriptor >= 0:
                return self._watch_pidfd(descriptor)
        if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in self._old_handlers:
            # A handler of Python's is what makes the wake-up descriptor ring.
            self._old_handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        return lambda: None

    def _watch_pidfd(self, descriptor: int) -> Callable[[], None]:
        open_ = True

        def end() -> None:
            nonlocal open_
            if open_:
                open_ = False
                self._selector.unregister(descriptor)
                os.close(descriptor)

        self._selector.register(descriptor, selectors.EVENT_READ, end)  # once: it stays readable for ever
        return end

    def wait(self, timeout_s: float) -> bool:
        """Until something happens, at most so long. Whether something did."""
        ready = self._selector.select(max(0.0, timeout_s))
        for key, _mask in ready:
            key.data()
        return bool(ready)

    def close(self) -> None:
        """Give the signals back and close everything of ours."""
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._selector.close()
        self._wake_up.close()
        self._wake_up_end.close()

    def _quit(self, number: int, _frame: object) -> None:
        self.quit_signal = signal.Signals(number).name

    def _drain(self) -> None:
        try:
            while self._wake_up.recv(4096):
                pass
        except BlockingIOError:
            pass
