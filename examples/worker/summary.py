#!/usr/bin/env python3
"""Say of each file named on the command line how many lines and bytes it has, and its SHA-256."""

import hashlib
import sys
from pathlib import Path


def main() -> None:
    for name in sys.argv[1:]:
        digest, lines, size = hashlib.sha256(), 0, 0
        with Path(name).open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
                lines += block.count(b"\n")
                size += len(block)
        print(f"{name}: {lines} lines, {size} bytes, SHA-256 {digest.hexdigest()}")


if __name__ == "__main__":
    main()
