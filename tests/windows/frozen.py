"""The wrapper frozen for Windows, under wine: `python -m tests.windows.frozen DIR` puts it into a new directory.

It is what `recipe.py` makes on a Windows of one's own. Made once for the same sources, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from pathlib import Path

from host_agent.bundle.freeze import finish, own_sources
from vm_images.cache import Cache, digest_of

from .wine import CACHE, LOCK, ROOT, Wine, running_wine, windows_path

DEADLINE_S = 900.0  # a minute or less on an idle computer


def frozen_for_windows(wine: Wine) -> Path:
    """Its directory, which nobody may change."""
    key = digest_of([LOCK.read_bytes(), hashlib.sha256(Path(__file__).read_bytes()).digest(), *own_sources()])

    def make(place: Path) -> None:
        words = [ROOT / "host_agent" / "bundle" / "recipe.py", place, ROOT, wine.python / "Lib" / "site-packages"]
        done = wine.run(wine.argv("-I", *(windows_path(word) for word in words)), ROOT, deadline_s=DEADLINE_S)
        if done.returncode:
            raise RuntimeError(f"the wrapper for Windows was not frozen: {(done.stdout + done.stderr)[-2000:]}")
        finish(place)

    return Cache(CACHE, keep=1).layer("frozen", key, make)


def main(target: Path) -> int:
    if target.exists():
        print(f"{target} exists already", file=sys.stderr)
        return 1
    began = time.monotonic()
    with running_wine() as wine:
        shutil.copytree(frozen_for_windows(wine), target)
    print(f"{target}: frozen for Windows in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
