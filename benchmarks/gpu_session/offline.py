"""Runs a command where there is no network but this machine itself, as on the GPU machine. It needs root, and Linux.

python -m benchmarks.gpu_session.offline COMMAND ...
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def main(command: list[str]) -> None:
    """Becomes `command`. Raises SystemExit where the system refuses a network of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise SystemExit(f"no network of its own: {os.strerror(ctypes.get_errno())}; run this as root")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
