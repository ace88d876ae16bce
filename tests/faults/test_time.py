"""Processes that are stopped and go on: deadlines count only the time in which they ran."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import watchdog_worker
from toy_runs import Toy, command, environment, start_ranks
from watchdog_worker import TIMEOUT_S

from lens_megatron.output.metrics import read_metrics
from lens_megatron.supervision.clock import Clock, RunTime
from lens_megatron.supervision.deadman import EXIT_SIGNAL, RESUME_S

PATIENCE_S = 300.0


def wait_until(what: str, holds) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.05)


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """All of them are stopped within the block."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def whole(process: subprocess.Popen) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def test_run_time_stands_still_while_nobody_ticks():
    run_time = RunTime()
    before = run_time.now()
    time.sleep(2 * RunTime.LONGEST_S)
    assert run_time.now() - before <= RunTime.LONGEST_S
    clock = Clock()
    with clock.run_time.ticking(), clock("gen"):
        wait_until("ticks", lambda: clock.seconds_since(clock.position) > 1.5 * RunTime.LONGEST_S)


DEADMAN = """
import sys, time, ctypes
from lens_megatron.supervision.deadman import Deadman
deadman = Deadman()
deadman.arm(1.0)
print("armed", flush=True)
if sys.argv[1] == "locked":
    ctypes.PyDLL(None).sleep(600)
for _ in range(60):
    time.sleep(0.1)
    deadman.arm(1.0)
deadman.close()
time.sleep(0.5)
"""


def deadman_process(how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", DEADMAN, how],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "armed\n", process.communicate()
    return process


def test_the_deadman_spares_a_process_that_was_stopped():
    process = deadman_process("alive")
    with stopped([psutil.Process(process.pid)]):
        time.sleep(4.0)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, error) == (0, "")


@pytest.mark.slow
def test_the_deadman_ends_a_process_that_holds_the_lock():
    process = deadman_process("locked")
    _, error = process.communicate(timeout=RESUME_S + PATIENCE_S)
    assert process.returncode == -EXIT_SIGNAL
    assert 'File "<string>"' in error, "no stacks"


def test_ranks_that_are_suspended_together_go_on(tmp_path: Path):
    begun = [tmp_path / f"begun_{rank}" for rank in range(2)]
    with start_ranks(2, Path(watchdog_worker.__file__), tmp_path, "fine", "1", together=False) as ranks:
        wait_until("both ranks", lambda: all(path.exists() for path in begun) or not ranks.runs())
        with stopped([psutil.Process(pid) for pid in ranks.pids]):
            time.sleep(3 * TIMEOUT_S)
        assert ranks.wait() == [0, 0], ranks.stderr()
    assert not (tmp_path / "watchdog").exists()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["the whole job", "its launcher"])
def test_a_run_that_is_suspended_goes_on(toy: Toy, who: str, tmp_path: Path):
    """The suspension lasts three times as long as the deadline of a phase."""
    tree = toy.tree(
        tmp_path / "run",
        run={"phase_timeout_minutes": 0.25},
        train={"steps": 100000, "save_interval": 100000},
    )
    output = (tmp_path / "output").open("w+")
    process = subprocess.Popen(command(tree, tmp_path, 2), env=environment(), stdout=output, stderr=output)
    try:
        wait_until("the first step", lambda: read_metrics(tmp_path / "run") or process.poll() is not None)
        assert process.poll() is None, Path(output.name).read_text()[-6000:]
        with stopped(whole(process) if who == "the whole job" else whole(process)[:1]):
            time.sleep(45.0)
        done = len(read_metrics(tmp_path / "run"))
        wait_until("more steps", lambda: len(read_metrics(tmp_path / "run")) > done + 3 or process.poll() is not None)
        assert process.poll() is None, Path(output.name).read_text()[-6000:]
        psutil.Process(process.pid).children()[0].send_signal(signal.SIGTERM)  # one rank: all stop, in order
        assert process.wait(PATIENCE_S) == 0, Path(output.name).read_text()[-6000:]
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            process.wait(PATIENCE_S)
        output.close()
    assert not (tmp_path / "run" / "watchdog").exists()
