"""boincvm/HostMain.py of 2009: today's host agent, which reads the settings that were its first argument then."""

import sys
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent / "lib"
# In place of what the host itself has installed: a part of that (its OpenSSL bindings) may not fit our Twisted.
sys.path[:] = [str(LIBRARY), *(path for path in sys.path if not path.endswith("-packages"))]

from host_agent.main import main  # noqa: E402 (found in the library)

sys.exit(main(["--config", *sys.argv[1:]]))
