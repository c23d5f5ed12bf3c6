"""The first module of the one-file agent: run it as it is, or with --install, --uninstall or --service."""

import os
import sys

OLDEST = "@PYTHON@"

archive = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
here = "%d.%d" % sys.version_info[:2]  # noqa: UP031  (this line has to run on any Python)
if sys.version_info[:2] < tuple(int(part) for part in OLDEST.split(".")) or (OLDEST == "3.9" and here != OLDEST):
    other = "another agent file or the frozen agent" if OLDEST != "3.9" else "the agent file for newer ones"
    sys.exit("vmwrapper-guest-agent: this file is for Python %s, and this is %s: use %s" % (OLDEST, here, other))  # noqa: UP031

# Byte code for this very Python, when the archive has some, else the sources; and of this machine nothing but Python's
# own library: what else is installed here may be of any version, and Twisted would take 5 MB of TLS that nobody uses.
kept = [path for path in sys.path[1:] if not path.rstrip("/").endswith(("site-packages", "dist-packages"))]
sys.path[:] = [f"{archive}/cp{here.replace('.', '')}", f"{archive}/lib", *kept]

if "--install" in sys.argv[1:2] or "--uninstall" in sys.argv[1:2]:
    from guest_agent.service import main as install

    sys.exit(install(archive))
elif sys.argv[1:2] == ["--service"]:
    del sys.argv[1]
    from guest_agent.privileged import main as service

    sys.exit(service(archive))
else:
    from guest_agent.main import main

    sys.exit(main())
