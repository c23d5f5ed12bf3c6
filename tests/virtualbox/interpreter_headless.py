#!/usr/bin/python3
"""FOR TESTS ONLY, never shipped: stands in VBoxHeadless's place where VirtualBox's kernel driver cannot be loaded.

The real program refuses to run without its driver. This one asks VirtualBox's own run-time library for the
driverless mode first, in which a guest's instructions are interpreted: a few million a second, enough for a boot
sector or a boot ROM and for everything that VirtualBox does around a guest. `enter.sh` mounts it over the real
program in the name space of one test run.
"""

import ctypes
import sys

LIBRARIES = "/usr/lib/virtualbox"
STANDALONE = 1  # RTR3INIT_FLAGS_STANDALONE_APP
DRIVERLESS = 1 << 1 | 1 << 3  # SUPR3INIT_F_DRIVERLESS, SUPR3INIT_F_DRIVERLESS_IEM_ALLOWED


def main() -> int:
    runtime = ctypes.CDLL(f"{LIBRARIES}/VBoxRT.so", mode=ctypes.RTLD_GLOBAL)
    words = [word.encode() for word in [f"{LIBRARIES}/VBoxHeadless", *sys.argv[1:]]]
    count, array = len(words), (ctypes.c_char_p * (len(words) + 1))(*words, None)
    pointer = ctypes.cast(array, ctypes.POINTER(ctypes.c_char_p))
    status = runtime.RTR3InitExe(ctypes.c_int(count), ctypes.byref(pointer), ctypes.c_uint32(STANDALONE))
    if status < 0:
        print(f"RTR3InitExe: {status}", file=sys.stderr)
        return 1
    status = runtime.SUPR3InitEx(ctypes.c_uint32(DRIVERLESS), None)
    if status < 0:
        print(f"SUPR3InitEx: {status}", file=sys.stderr)
        return 1
    program = ctypes.CDLL(f"{LIBRARIES}/VBoxHeadless.so", mode=ctypes.RTLD_GLOBAL)
    return int(program.TrustedMain(ctypes.c_int(count), pointer, None))


if __name__ == "__main__":
    sys.exit(main())
