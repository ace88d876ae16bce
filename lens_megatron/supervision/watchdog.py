"""Ends a run in which a phase exceeds its deadline, after it has reported which ranks are late and what each rank did.

    clock.position --thread of every rank--> heartbeat --store--> the first rank past its deadline raises the alarm
    alarm --> every rank answers and prints its stacks --> the first one names the late ranks --> all exit with HANG

A deadline counts the time in which its rank ran: a job that is suspended as a whole goes on when it is resumed. The
time-outs of collectives count all time, so they are put off.

Two threads need nothing of the main thread, which may hang in a collective: one checks the deadline, and one talks to
the store, whose host may hang too. They have a connection to the store of their own, because a store's client serves
one caller at a time. Where no thread can run, the dead-man timer ends the process; the others then report that it does
not answer.
"""

import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from lens_megatron.errors import ExitCode
from lens_megatron.supervision import heartbeat
from lens_megatron.supervision.channel import ChannelError
from lens_megatron.supervision.clock import Clock, PhasePosition
from lens_megatron.supervision.control_store import ControlStore
from lens_megatron.supervision.deadman import Deadman
from lens_megatron.supervision.heartbeat import Heartbeat

MAX_TICK_S = 5.0
COLLECTIVE_TIMEOUT = timedelta(days=7)
"""Time-out of collectives under a watchdog, which ends hangs itself. A job may be suspended for so long at most."""
FILE_SECONDS = 5.0
"""Seconds that writing a report to the run folder may take: its file system may hang too."""


@contextmanager
def watch(clock: Clock, store: ControlStore, folder: Path, timeout_minutes: float) -> Iterator[None]:
    """Within the block, ends the run when a phase of `clock` lasts longer than `timeout_minutes`; 0 sets no limit.

    Needs torch.distributed. `store` belongs to this attempt of the job. Reports go to stderr and `folder`/watchdog/.
    """
    if not timeout_minutes:
        yield
        return
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        torch.distributed.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)
    with clock.run_time.ticking():
        watchdog = Watchdog(clock, store, folder / "watchdog", timeout_minutes * 60)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.stop()


class Watchdog:
    """The watchdog of one rank. `timeout_s` is the deadline of every phase, in seconds."""

    def __init__(self, clock: Clock, store: ControlStore, folder: Path, timeout_s: float):
        self.clock, self.folder, self.timeout_s = clock, folder, timeout_s
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.alarm, self.report = "watchdog/alarm", "watchdog/report"
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.tick = min(MAX_TICK_S, timeout_s / 10)
        self.grace = 3 * self.tick + 1.0
        """Seconds within which the other ranks must see the alarm and answer."""
        self.store = store.clone(timeout_s=self.grace)
        self._stopping, self._alarmed, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._talking = threading.Lock()
        """The lock that a thread holds while it uses the store."""
        self._deadman = Deadman()
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._keep_deadline,), name="watchdog", daemon=True),
            threading.Thread(target=self._guarded, args=(self._listen,), name="watchdog talks", daemon=True),
        ]

    def start(self) -> None:
        self._deadman.arm(self.timeout_s + 2 * self.tick + 1.0)  # the thread may never reach its first round
        self._beat(self.clock.position)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self.grace)
        self._deadman.close()
        self.store.close()

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception:  # a broken watchdog must never end a healthy run
            _say(f"watchdog: rank {self.rank} is unwatched from here:\n{traceback.format_exc()}")
            self._stopping.set()
            self._wake.set()
            self._deadman.disarm()

    def _keep_deadline(self) -> None:
        while True:
            self._wake.wait(self.tick)
            if self._stopping.is_set():
                return
            position = self.clock.position
            remaining = self.timeout_s - self.clock.seconds_since(position)
            self._deadman.arm(max(remaining, 0.0) + 2 * self.tick + 1.0)
            if remaining <= 0 or self._alarmed.is_set():
                self._end(position)

    def _listen(self) -> None:
        """Sends this rank's position and receives alarms."""
        while not self._stopping.wait(self.tick):
            with self._talking:
                if self._beat(self.clock.position):
                    self._alarmed.set()
                    self._wake.set()
                    return

    def _beat(self, position: PhasePosition) -> bool:
        """Sends this rank's position. Returns True when another rank has raised the alarm."""
        try:
            self._tell(position, answered=False)
            return self.store.check(self.alarm)
        except ChannelError:
            return False  # the store's host is gone: torchrun sees that, and the deadline still holds

    def _end(self, position: PhasePosition) -> None:
        """Reports and ends the process. Never returns, even if a part of it fails."""
        try:
            self._deadman.arm(5 * self.grace + FILE_SECONDS)
            stacks = f"watchdog: stacks of rank {self.rank}, step {position.step}, {position.phase}:\n{_stacks()}\n"
            _say(stacks)
            report: list[str] = []
            _within(4 * self.grace, lambda: report.append(self._ask_the_others(position)))
            _within(FILE_SECONDS, lambda: self._write_files(stacks, "".join(report)))
        finally:
            os._exit(ExitCode.HANG)

    def _ask_the_others(self, position: PhasePosition) -> str:
        """Returns the report on the rank that raised the alarm, and an empty text on the others."""
        try:
            if not self._talking.acquire(timeout=self.grace):
                raise ChannelError("the store that they share does not answer")
            first = self.store.add(self.alarm, 1) == 1
            self._tell(position, answered=True)
            return self._make_report() if first else self._await_report()
        except ChannelError as error:
            _say(f"watchdog: rank {self.rank} cannot reach the others: {error}\n")
            return ""

    def _tell(self, position: PhasePosition, *, answered: bool) -> None:
        beat = heartbeat.take(self.rank, position, self.clock.seconds_since(position), answered=answered)
        self.store.set(self._key(self.rank), beat.to_json().encode())

    def _key(self, rank: int) -> str:
        return f"watchdog/heartbeat/{rank}"

    def _make_report(self) -> str:
        """Makes the report on one rank only, so that the work does not grow with the square of the number of ranks."""
        until = time.monotonic() + self.grace
        while True:
            told = self.store.get([self._key(rank) for rank in range(self.world_size)])
            beats = [Heartbeat.from_json(text) if text else None for text in told]
            if all(beat and beat.answered for beat in beats) or time.monotonic() > until:
                break
            time.sleep(self.tick / 2)
        head = (
            f"watchdog: a phase lasted longer than run.phase_timeout_minutes ({self.timeout_s / 60:g}); every rank "
            f"ends with exit code {ExitCode.HANG}\nwatchdog: "
        )
        _say(f"{head}{heartbeat.report(beats)}\nwatchdog: all ranks and stacks: {self.folder}\n")
        self.store.set(self.report, b"said")
        return head + heartbeat.report(beats, limit=None)

    def _await_report(self) -> str:
        """Waits, so that the first rank to end does not make torchrun kill the others before they have reported."""
        until = time.monotonic() + 2 * self.grace
        try:
            while not self.store.check(self.report) and time.monotonic() < until:
                time.sleep(self.tick / 2)
        except ChannelError:
            pass  # the store's host has ended, so the report is written
        return ""

    def _write_files(self, stacks: str, report: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"attempt_{self.attempt}_rank_{self.rank:05d}.txt").write_text(stacks)
            if report:
                (self.folder / f"attempt_{self.attempt}_report.txt").write_text(report + "\n")
        except OSError as error:
            _say(f"watchdog: rank {self.rank} cannot write to {self.folder}: {error}\n")


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Runs `action`, which may never return, and waits for it for at most `seconds`."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)


def _stacks() -> str:
    """Returns the stacks of all threads. Uses faulthandler, which reads no source files: their file system may hang."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _say(text: str) -> None:
    """Writes `text` in one call, so that the ranks' texts do not mix."""
    if sys.__stderr__ is not None:
        sys.__stderr__.write(text)
        sys.__stderr__.flush()
