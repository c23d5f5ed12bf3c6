"""Starts the guest agent: `python3 -I -S start.py`. Only our own packages, beside this file, are on its path."""

import os
import sys

root = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  (pathlib costs part of a second here)
sys.path.insert(0, root)
if sys.argv[1:2] in (["--install"], ["--uninstall"]):
    from guest_agent.service import main
else:
    from guest_agent.privileged import main

if __name__ == "__main__":
    sys.exit(main(root))
