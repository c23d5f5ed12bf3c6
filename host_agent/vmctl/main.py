"""`vmctl`: one command for everything that a person does. Each subcommand has a module with `add_parser`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from common.errors import VMwrapperError
from host_agent import __version__

# In the order of the help: first what a scientist needs, then image builders, then operators.
SUBCOMMANDS = (
    "new",
    "check",
    "start",
    "vms",
    "run",
    "copy",
    "control",
    "image",
    "bundle",
    "doctor",
    "sweep",
    "broker",
    "monitor",
    "trace",
    "top",
)

EPILOG = """\
exit codes: 0 done; 1 it could not be done (the reason is on standard error); 2 the command line is wrong.
`vmctl run` ends with the exit code of the command that it ran.

examples:
  vmctl check job.xml               is this job in order, and what would run where?
  vmctl image build                 build the default guest image
  vmctl start worker                start a VM from it, until Ctrl-C
  vmctl run worker -- uname -a      run a command in it
  vmctl copy data.txt worker:data/  copy a file into it, and back: vmctl copy worker:data/out.txt .
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the subcommand, and turn our errors into sentences."""
    parser = argparse.ArgumentParser(
        prog="vmctl",
        description="See and steer the virtual machines of VMwrapper, and everything around them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vmctl {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        importlib.import_module(f"host_agent.vmctl.{name}").add_parser(subparsers)
    options = parser.parse_args(argv)
    try:
        code: int = options.func(options)
        return code
    except VMwrapperError as error:
        print(f"vmctl: {error.explain()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1  # whoever read our output has left


if __name__ == "__main__":
    sys.exit(main())
