"""What goes into the frozen wrapper. Run by path, in a process of its own, because cx_Freeze works on `sys.path`:

python -I recipe.py TARGET SOURCES LIBRARIES [OPTIONAL PART THAT IS LEFT OUT]...
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from sysconfig import get_path

# Programs that are started by name (`host_agent/programs.py`), and modules that are named only in strings.
PROGRAMS = ("host_agent.main", "host_agent.hypervisors.leash", "host_agent.hypervisors.fd_passing")
INCLUDES = (*PROGRAMS, "lxml._elementpath", "encodings.idna")
# A Windows that is itself a guest has no Python either: there the same program is the guest agent.
ON_WINDOWS = ("guest_agent.main",)
OPTIONAL = {
    "virtualbox": ("host_agent.hypervisors.virtualbox", "virtualbox", "vboxapi", "win32com", "pythoncom", "pywintypes"),
}
# For the scripts of a job (`programs.script_argv`): small, and what scripts on a volunteer's host are made of.
FOR_SCRIPTS = """
    argparse array base64 binascii bisect calendar collections configparser contextlib copy csv dataclasses datetime
    decimal enum fnmatch fractions functools glob gzip hashlib heapq html io itertools json logging math operator os
    pathlib pickle platform pprint queue random re secrets shutil signal socket statistics string struct subprocess
    tarfile tempfile textwrap threading time traceback types typing uuid xml.etree.ElementTree zipfile zlib
"""
EXCLUDES = """
    _pytest asyncio.test cffi concurrent.futures.process cryptography ctypes.test curses distutils doctest ensurepip
    host_agent.bundle host_agent.metrics host_agent.metrics_page host_agent.monitor host_agent.vmctl hypothesis idlelib
    lib2to3 lxml.builder lxml.cssselect lxml.html lxml.isoschematron
    lxml.objectify lxml.sax multiprocessing mypy numpy pdb pip pkg_resources pydoc pydoc_data
    pytest readline setuptools sqlite3 tests tkinter turtle twisted.conch twisted.mail twisted.names twisted.trial
    twisted.words unittest venv vm_images wheel xmlrpc
"""


def main(target: str, sources: str, libraries: str, *left_out: str) -> None:
    from cx_Freeze import Executable, Freezer

    # Wheels for old systems, and nothing that this Python has besides: what is not in the lock file is not frozen.
    installed = {get_path("purelib"), get_path("platlib")}
    path = [libraries, sources, *(each for each in sys.path if each not in installed)]
    optional = {name for name in OPTIONAL if name not in left_out}
    schema = Path("host_agent/wrapper/job.rng")
    includes = [*INCLUDES, *FOR_SCRIPTS.split(), *(ON_WINDOWS if sys.platform == "win32" else ())]
    if "virtualbox" in optional:
        includes.append("host_agent.hypervisors.virtualbox.worker")
    Freezer(
        [Executable(Path(sources) / "host_agent/frozen.py", target_name="vmwrapper")],
        includes=includes,
        excludes=[*EXCLUDES.split(), *(module for name in left_out for module in OPTIONAL[name])],
        bin_includes=["libz.so"],  # the one library that wheels take from the system; a small system may lack it
        bin_excludes=["scintilla.dll", "perfmondata.dll", "PyISAPI_loader.dll"],  # pywin32's own programs have them
        optimize=2,
        path=path,
        target_dir=target,
        silent=1,
        zip_include_packages=["*"],
        zip_exclude_packages=[],
        zip_includes=[(Path(sources) / schema, schema)],
    ).freeze()
    if sys.platform == "win32":
        # What Python brings of Windows' C library and cx_Freeze leaves out; a Windows of its own need not have it.
        for each in Path(sys.executable).parent.glob("vcruntime140*.dll"):
            shutil.copy(each, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
