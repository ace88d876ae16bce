"""Ends a run within seconds of SIGTERM, SIGINT or SIGHUP, however long a step takes, with the last finished step saved.

    signal --wakeup descriptor--> a thread of every rank --rounds over a group of their own--> all ranks know
    the step ends within GRACE_ROUNDS --> the main threads save and return
    it does not                       --> the threads save the last finished step and end their processes

Python runs a signal's handler only between two instructions of the main thread, which may be in a collective or in C
code for minutes; the wakeup descriptor is written at once. All ranks do the same in the same round, because each
decides from the messages of all.
"""

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, Protocol, Self

import torch
from torch.distributed import ProcessGroup, ReduceOp

from lens_megatron.errors import ExitCode
from lens_megatron.supervision.agreement import shared_failure
from lens_megatron.supervision.heartbeat import UNCOUNTED

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROUND_S = 0.5
GRACE_ROUNDS = 8
"""Number of rounds within which the main threads may end their step after a signal."""
SETTLE_ROUNDS = 100
"""Number of attempts of the threads to find a moment at which all ranks hold the same step."""
HOLD_S = 0.2
LOST_S = 20.0
"""Seconds for which a rank that was told to stop goes on where another one is lost, so that nothing can be saved."""
REPEAT_S = 5.0
"""Seconds in which further SIGINTs are ignored: one Ctrl-C reaches a process from the terminal and from torchrun."""
_NO_SIGNAL = b"\0"
"""A message that wakes the thread and asks for nothing."""
_PATIENCE = timedelta(days=7)
"""Time limit of a round. A suspended rank is no reason to end anything, and one that dies ends the wait at once."""

Agree = Callable[[str | None], str | None]
"""A collective that returns the failure of this rank or of another, or None when all succeeded."""


class LastStep(Protocol):
    """Gives the threads access to the last finished step. They call it while the main thread goes on."""

    def hold(self, seconds: float) -> int | None:
        """Keeps the step's state as it is and returns the step; None when that cannot be done in time."""

    def release(self) -> None:
        """Undoes `hold`."""

    def is_saved(self) -> bool:
        """Returns whether the step that is held is on the disk, or has nothing to save."""

    def save(self, agree: Agree) -> str | None:
        """Saves the step that is held; returns the failure, if there is one. A collective of the threads."""

    def abandon(self) -> None:
        """Ends helper processes and releases resources that other processes wait for. The process ends next."""


@dataclass(frozen=True, slots=True)
class Round:
    """The message of one rank in a round, or the combination of all ranks' messages."""

    asked: bool
    """A signal asked this rank to stop; combined: it asked any rank."""
    claimed: bool
    """The main thread is at the end of its step and will save; combined: that of any rank is."""
    unsaved: bool
    """The held step is not on the disk; combined: on any rank."""
    leaving: bool
    """The main thread is done; combined: those of all ranks are."""
    attached: bool
    """There is a last step; combined: on every rank."""
    held: bool
    """The thread holds the last step; combined: on every rank."""
    first: int = 0
    """The step that is held; combined: the earliest of them."""
    last: int = 0

    def combined(self, group: ProcessGroup) -> "Round":
        """Combines the messages of all ranks. A collective."""
        alls = (self.leaving, self.attached, self.held, self.first)
        told = torch.tensor([self.asked, self.claimed, self.unsaved, self.last, *(-value for value in alls)])
        torch.distributed.all_reduce(told, op=ReduceOp.MAX, group=group)
        asked, claimed, unsaved, last, leaving, attached, held, first = told.tolist()
        return Round(bool(asked), bool(claimed), bool(unsaved), bool(leaving), bool(attached), bool(held), -first, last)


class Stop:
    """Listens for signals within its block, which the main thread must enter. A SIGINT REPEAT_S after the first kills.

    Before `meet` a signal ends this process at once, with exit code 0; afterwards it ends those of all ranks.
    """

    def __init__(self) -> None:
        self.asked = False
        self._name = ""
        self._since: float | None = None
        self._group: ProcessGroup | None = None
        self._last_step: LastStep | None = None
        self._turn = threading.Condition()
        self._claimed = self._frozen = self._leaving = self._alone = False
        self._thread = threading.Thread(target=self._guarded, name="stop", daemon=True)

    def __enter__(self) -> Self:
        self._inbox, self._outbox = socket.socketpair()
        for end in (self._inbox, self._outbox):
            end.setblocking(False)
        self._descriptor = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        # Under nohup hang-ups are ignored on purpose.
        heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._handle) for number in heeded}
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Does not return once the threads have begun to end the processes: `error` is then only a consequence."""
        self.claim()
        self._leaving, self._alone = True, error is not None
        with suppress(BlockingIOError):  # signals have filled it, and wake the thread as well
            self._outbox.send(_NO_SIGNAL)  # otherwise the thread would notice only at the end of its ROUND_S
        self._thread.join(2.0 if self._alone else 20.0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor)
        if not self._thread.is_alive():
            self._inbox.close()
            self._outbox.close()

    def meet(self) -> None:
        """Connects the ranks, so that a signal to any of them stops all. A collective; needs torch.distributed."""
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE, group_desc=UNCOUNTED)

    def attach(self, last_step: LastStep) -> None:
        """Sets the last step, which is saved from now on when a signal comes."""
        self._last_step = last_step

    def agreed(self, device: torch.device) -> bool:
        """Returns, at the end of a step, whether any rank was asked to stop. A collective of the main threads."""
        asked = torch.tensor([self.asked], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(asked, op=ReduceOp.MAX)
        return bool(asked.item())

    def claim(self) -> None:
        """Announces that the main threads, all of which call it after the same step, will save and return themselves.

        Does not return when the other threads have begun to do so.
        """
        with self._turn:
            self._turn.wait_for(lambda: not self._frozen)
            self._claimed = True

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif number == signal.SIGINT and now - self._since > REPEAT_S:
            os._exit(128 + number)

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:  # gloo raises it when a rank is lost
            lost = f"the last step could not be saved: another rank was lost: {error}"
            if self._frozen:
                self._end(ExitCode.CRASH, lost)
            while not self.asked and not self._leaving:
                self._listen()
            deadline = time.monotonic() + LOST_S  # the main thread may find the loss too, and report more
            while not self._leaving and time.monotonic() < deadline:
                self._listen()
            if not self._leaving:
                self._end(ExitCode.CRASH, lost)

    def _run(self) -> None:
        while self._group is None:
            if self._leaving:
                return
            self._listen()
            if self.asked and self._group is None:
                self._end(ExitCode.DONE, f"{self._name}: stopped before anything was begun")
        rounds, said = 0, False
        while not self._alone:
            self._listen()
            seen = self._told().combined(self._group)
            if seen.leaving:
                return
            if not seen.asked:
                continue
            if not said:
                self.asked = said = True
                logger.info(f"{self._name or 'another rank was told to stop'}: stopping within seconds")
            if not seen.claimed:
                rounds += 1
                if rounds > GRACE_ROUNDS or not seen.attached:
                    self._take_over(self._group)

    def _listen(self) -> None:
        if not select.select([self._inbox], [], [], ROUND_S)[0]:
            return
        heard = [number for number in self._inbox.recv(4096) if number in SIGNALS]
        if heard and not self.asked:
            self.asked, self._name = True, signal.Signals(heard[0]).name

    def _told(self, *, held: bool = False, step: int = 0, unsaved: bool = False) -> Round:
        attached = self._last_step is not None
        return Round(self.asked, self._claimed, unsaved, self._leaving, attached, held, step, step)

    def _take_over(self, group: ProcessGroup) -> None:
        """Saves and ends the process. Returns only if a main thread, and so all of them, ended their step after all."""
        with self._turn:
            self._frozen = not self._claimed
        seen = self._told().combined(group)
        if seen.claimed:
            with self._turn:
                self._frozen = False
                self._turn.notify_all()
            return
        last_step = self._last_step
        if last_step is None or not seen.attached:
            self._end(ExitCode.DONE, "stopped as asked before the first step; the same command starts again")
        step = self._settle(group, last_step)
        if step is None:
            self._end(ExitCode.MISTAKE, "the last step could not be saved: the ranks do not come to hold the same")
        failure = None
        if self._told(unsaved=not last_step.is_saved()).combined(group).unsaved:
            failure = last_step.save(self._agree)
        if failure:
            self._end(ExitCode.MISTAKE, f"stopped as asked, but step {step} could not be saved: {failure}")
        self._end(ExitCode.DONE, f"stopped as asked after step {step}; the same command goes on from here")

    def _settle(self, group: ProcessGroup, last_step: LastStep) -> int | None:
        """Holds the last step until all ranks hold the same one, and returns it; None where they never do."""
        for _ in range(SETTLE_ROUNDS):
            step = last_step.hold(HOLD_S)
            seen = self._told(held=step is not None, step=step or 0).combined(group)
            if seen.held and seen.first == seen.last:
                return step
            if step is not None:
                last_step.release()  # another rank waits for this one's main thread
            time.sleep(HOLD_S)
        return None

    def _agree(self, failure: str | None) -> str | None:
        return shared_failure(failure, self._group, "this rank's part could not be saved")

    def _end(self, code: ExitCode, text: str) -> NoReturn:
        """Logs `text` and ends the process. Does not return."""
        try:
            if self._last_step is not None:
                self._last_step.abandon()
            if self._rank() == 0:
                logger.log(logging.INFO if code == ExitCode.DONE else logging.ERROR, text)
            with suppress(RuntimeError):  # nothing depends on it: the ranks end together where they can
                if self._group is not None and code != ExitCode.CRASH:
                    self._agree(None)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(code)

    def _rank(self) -> int:
        return int(os.environ.get("RANK", 0))
