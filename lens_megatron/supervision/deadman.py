"""A timer in native code that ends the process when nobody rearms it: the last line where Python itself cannot run.

A watchdog thread is no help while C code holds the interpreter's lock, or while the thread itself hangs in a network
call. faulthandler then writes the stacks without the lock, and a POSIX timer calls `_exit`: faulthandler could end the
process too, but only with status 1, which says nothing.
"""

import ctypes
import faulthandler
import os
import sys
from typing import TextIO

EXIT_AFTER_S = 2.0
"""Between the stacks and the end, so that they are written."""
_CLOCK_MONOTONIC, _SIGEV_THREAD = 1, 2


class _SigEvent(ctypes.Structure):
    """glibc's struct sigevent on 64-bit machines; 64 bytes."""

    _fields_ = [
        ("value", ctypes.c_int64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    ]


class _TimerSpec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class Deadman:
    """After `arm(seconds)`, and no other call, stacks go to `file` and the process ends with `exit_code`."""

    def __init__(self, exit_code: int, file: TextIO | None = None):
        self.file = file or sys.__stderr__
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" and sys.maxsize > 2**32 else None
        self._timer = ctypes.c_void_p()
        if self._libc:
            end = ctypes.cast(self._libc._exit, ctypes.c_void_p)
            event = _SigEvent(value=exit_code, notify=_SIGEV_THREAD, function=end)
            if self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
                self._libc = None

    def arm(self, seconds: float) -> None:
        """Starts over. Without POSIX timers the process ends at once after its stacks, with status 1."""
        faulthandler.dump_traceback_later(seconds, file=self.file, exit=self._libc is None)
        self._set(seconds + EXIT_AFTER_S)

    def disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._set(0.0)

    def close(self) -> None:
        self.disarm()
        if self._libc:
            self._libc.timer_delete(self._timer)
            self._libc = None

    def _set(self, seconds: float) -> None:
        if not self._libc:
            return
        spec = _TimerSpec(first_s=int(seconds), first_ns=int(seconds % 1 * 1e9))
        if self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None):
            raise OSError(f"timer_settime({seconds}) failed in process {os.getpid()}")
