"""A timer in native code that ends the process when nobody rearms it, for hangs in which no Python code can run.

A watchdog thread is no help while C code holds the interpreter's lock. Then a POSIX timer calls libc's `alarm`, and
`RESUME_S` later SIGALRM makes faulthandler write all stacks, without the lock, and ends the process.

`faulthandler.dump_traceback_later(exit=True)` cannot take its place: it ends the process as soon as its time is over.
The clock goes on while a process is stopped, so one that was stopped for longer than its deadline finds the timer
expired as soon as it goes on. This timer does not end it at once: within `RESUME_S` its watchdog thread runs again,
calls `arm`, and so cancels the alarm. The disadvantage is the exit status: libc has no function that a timer could call
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
"""Seconds within which a process that goes on after a stop must rearm the timer."""
_CLOCK_MONOTONIC, _SIGEV_THREAD = 1, 2


class _SigEvent(ctypes.Structure):
    """The struct sigevent of glibc on 64-bit machines, which has 64 bytes."""

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
    """Writes stacks to stderr and ends the process by SIGALRM, `RESUME_S` after `arm(seconds)` has run out.

    Another call in time prevents it. Only the main thread may create and close it; nothing else may use SIGALRM
    meanwhile. Without POSIX timers `arm` does nothing.
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
        """Starts the timer again, and cancels an alarm that is pending."""
        self._set(seconds)

    def disarm(self) -> None:
        self._set(0.0)

    def close(self) -> None:
        if not self._libc:
            return
        self.disarm()
        faulthandler.unregister(EXIT_SIGNAL)
        signal.signal(EXIT_SIGNAL, signal.SIG_IGN)  # an expired timer's thread may still call `alarm`
        self._libc.timer_delete(self._timer)
        self._libc = None

    def _set(self, seconds: float) -> None:
        if not self._libc:
            return
        spec = _TimerSpec(first_s=int(seconds), first_ns=int(seconds % 1 * 1e9))
        if self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None):
            raise OSError(f"timer_settime({seconds}) failed in process {os.getpid()}")
        self._libc.alarm(0)
