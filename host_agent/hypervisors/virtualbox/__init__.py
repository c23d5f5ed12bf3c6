"""VirtualBox: `driver.py` is the hypervisor driver; everything that touches pyvbox runs in a process of its own.

    driver.py ── calls.py ──one line of JSON a call── worker.py ── box.py ── pyvbox.py ── VirtualBox's service

XPCOM objects belong to the thread that made them, a call can hang for as long as VirtualBox's service does, and its
libraries have crashed their users. In a process of its own a call that does not come back costs that process, never
the host agent. This file imports nothing: the worker must not load the reactor.
"""
