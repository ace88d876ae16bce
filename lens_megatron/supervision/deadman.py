"""A timer in native code that ends the process when nobody rearms it: the last line where Python itself cannot run.

A watchdog thread is no help while C code holds the interpreter's lock. Then a POSIX timer calls libc's `alarm`, and
`RESUME_S` later SIGALRM makes faulthandler write all stacks, without the lock, and ends the process.

`faulthandler.dump_traceback_later(exit=True)` cannot take its place: it ends the process as soon as its time is over,
so that a process which was stopped for longer than its deadline would be ended when it goes on. This timer does not end
it at once, because the clock goes on while the process is stopped: a process that was suspended
for longer than its deadline finds the timer expired as soon as it goes on. Within `RESUME_S` its watchdog thread runs
again, calls `arm`, and so takes the alarm back. The price is the status: libc has no function that a timer could call
to end the process later with a code of ours.
"""

import ctypes
import faulthandler
import os
import signal
import sys

EXIT_SIGNAL = signal.SIGALRM
"""The signal that ends the process."""
RESUME_S = 15.0
"""Seconds that a process which goes on after a stop has to rearm the timer."""
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
    """After `arm(seconds)`, and no other call for `RESUME_S` more, stacks go to stderr and SIGALRM ends the process.

    Only the main thread may create and close it; SIGALRM is its own meanwhile. Without POSIX timers `arm` does nothing.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" and sys.maxsize > 2**32 else None
        self._timer = ctypes.c_void_p()
        if not self._libc:
            return
        alarm = ctypes.cast(self._libc.alarm, ctypes.c_void_p)
        event = _SigEvent(value=round(RESUME_S), notify=_SIGEV_THREAD, function=alarm)
        if self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            self._libc = None
            return
        signal.signal(EXIT_SIGNAL, signal.SIG_DFL)
        if sys.__stderr__ is not None:
            faulthandler.register(EXIT_SIGNAL, file=sys.__stderr__, all_threads=True, chain=True)

    def arm(self, seconds: float) -> None:
        """Starts over, and takes back an alarm that is under way."""
        self._set(seconds)

    def disarm(self) -> None:
        self._set(0.0)

    def close(self) -> None:
        if not self._libc:
            return
        self.disarm()
        faulthandler.unregister(EXIT_SIGNAL)
        signal.signal(EXIT_SIGNAL, signal.SIG_IGN)  # an expired timer's thread may be about to call `alarm` still
        self._libc.timer_delete(self._timer)
        self._libc = None

    def _set(self, seconds: float) -> None:
        if not self._libc:
            return
        spec = _TimerSpec(first_s=int(seconds), first_ns=int(seconds % 1 * 1e9))
        if self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None):
            raise OSError(f"timer_settime({seconds}) failed in process {os.getpid()}")
        self._libc.alarm(0)
