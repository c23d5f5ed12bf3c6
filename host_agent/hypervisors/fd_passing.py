"""Hands its standard input over to a Unix socket, and ends.

QEMU starts this for every TCP connection that a guest makes to one of its service ports: standard input is then the
host's end of that connection. The host agent gets the descriptor itself and talks to the guest without any relay.
Run by path with `python -I -S`; imports as little as it can, because every connection waits for it: `socket` is the
constants of `_socket` as enums, which take as long as Python itself.
"""

import _socket as socket
import array
import sys


def main() -> None:
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    agent.settimeout(10)
    agent.connect(sys.argv[1])
    agent.sendmsg([b"c"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])


if __name__ == "__main__":
    main()
