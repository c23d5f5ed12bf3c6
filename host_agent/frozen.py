"""The main script of the frozen program: `vmwrapper`, or another program of ours (`programs.py`)."""

from __future__ import annotations

import sys

from host_agent.programs import LAUNCHED, MODULE, SCRIPT

OURS = ("host_agent.", "guest_agent.")


def main() -> int:
    """What the words ask for. A mode's word is the first one, so that no option of a job is taken for it."""
    if sys.argv[1:2] == [LAUNCHED]:
        del sys.argv[1:3]
    mode, name = (*sys.argv[1:3], "", "")[:2]
    if mode == MODULE and name.startswith(OURS):
        import runpy

        sys.argv[:3] = [name]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0
    if mode == SCRIPT and name:
        import runpy

        sys.argv[:3] = [name]
        # As `python3 script` does; our own modules stay in reach behind what the script brings.
        sys.path.insert(0, name.replace("\\", "/").rpartition("/")[0] or ".")
        runpy.run_path(name, run_name="__main__")
        return 0
    from host_agent.wrapper.main import main as wrapper

    return wrapper()


if __name__ == "__main__":
    sys.exit(main())
