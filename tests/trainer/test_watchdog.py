"""Real hangs of one rank of two: everyone prints its stacks, the late one is named, all exit with the same code.

What is not covered: NCCL. Stops of whole jobs, and of the store's host, are in tests/faults/test_time.py; that nothing
ends where nobody hangs, in tests/faults/test_outsiders.py.
"""

import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import watchdog_worker
from toy_runs import Toy, command, environment, start_ranks
from watchdog_worker import LATE

from lens_megatron.errors import ExitCode
from lens_megatron.supervision.clock import Clock
from lens_megatron.supervision.control_store import ControlStore
from lens_megatron.supervision.deadman import EXIT_SIGNAL
from lens_megatron.supervision.heartbeat import Heartbeat, late_ranks, report
from lens_megatron.supervision.watchdog import watch


def run(folder: Path, how: str, late: int = LATE) -> tuple[list[int], list[str]]:
    """Exit codes and standard error of both ranks."""
    with start_ranks(2, Path(watchdog_worker.__file__), folder, how, str(late), together=False) as ranks:
        if how == "frozen":  # as torchrun would
            ranks.await_end_of(1 - late)
            ranks.send(signal.SIGKILL, rank=late)
        return ranks.wait(), [ranks.stderr_of(rank) for rank in range(2)]


@pytest.mark.parametrize(
    ("how", "late"),
    [
        ("late", f"late: rank {LATE} in update_actor of step 7 (others of its group have begun a collective"),
        ("earlier", f"late: rank {LATE} in gen of step 7 (in an earlier phase"),
        ("locked", f"late: rank {LATE} in update_actor of step 7 (did not answer"),
    ],
)
def test_a_hang_is_named_and_ends_every_rank(how: str, late: str, tmp_path: Path):
    codes, errors = run(tmp_path, how)
    assert codes == [ExitCode.HANG, -EXIT_SIGNAL if how == "locked" else ExitCode.HANG], errors
    text = "".join(errors)
    assert text.count(late) == 1 and "run.phase_timeout_minutes (0.05)" in text, text
    for rank, error in enumerate(errors):
        assert "watchdog_worker.py" in error and "in main" in error, "no stack of the main thread"
        assert "Thread 0x" in error and (rank == LATE or "in all_reduce" in error)
    files = {path.name for path in (tmp_path / "watchdog").iterdir()}
    assert {"attempt_0_report.txt", "attempt_0_rank_00000.txt"} <= files
    assert late in (tmp_path / "watchdog" / "attempt_0_report.txt").read_text()
    if how != "locked":
        assert f"attempt_0_rank_{LATE:05d}.txt" in files


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_frozen_rank_is_named_by_the_others(late: int, tmp_path: Path):
    """Rank 0 too, whose process started the store."""
    codes, errors = run(tmp_path, "frozen", late)
    assert codes[late] == -signal.SIGKILL and codes[1 - late] == ExitCode.HANG, errors
    assert f"late: rank {late} in update_actor of step 7 (did not answer" in errors[1 - late], errors[1 - late]


def test_zero_minutes_switch_it_off(tmp_path: Path):
    with watch(Clock(), ControlStore(["unused", 0], b""), tmp_path, 0):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


BEAT = Heartbeat(0, 7, "update_actor", 60.0, 14, {"0": 5}, "x.py:1 in f", waiting=True, answered=True)


def beats(*changes: dict) -> list[Heartbeat]:
    return [replace(BEAT, rank=rank, **change) for rank, change in enumerate(changes)]


def test_which_rank_is_late():
    assert late_ranks([BEAT, None]).ranks == (1,)
    assert late_ranks(beats({}, {}, {"answered": False, "changes": 15})).ranks == (2,)
    assert late_ranks(beats({}, {"changes": 13}, {"changes": 13, "waiting": False})).ranks == (1, 2)
    # TP pairs (0, 1), (2, 3), DP pairs (0, 2), (1, 3). Rank 3 sleeps; 2 waits for it, 0 waits for 2, 1 for 3.
    groups = [{"tp01": 4, "dp02": 9}, {"tp01": 4, "dp13": 9}, {"tp23": 4, "dp02": 8}, {"tp23": 3, "dp13": 8}]
    assert late_ranks(beats(*({"collectives": group} for group in groups))).ranks == (3,)
    assert late_ranks(beats({}, {"waiting": False}, {})).ranks == (1,)
    assert late_ranks(beats({}, {})).ranks == (0, 1)


def test_a_report_of_a_thousand_ranks_is_short():
    text = report(beats({}, *[{"changes": 13, "phase": "gen"}] * 40, *[{}] * 959))
    assert len(text.splitlines()) == 34 and text.startswith("late: rank 1, 2, ") and "and 968 more" in text
    assert "in gen of step 7" in text.splitlines()[0]
    assert len(report(beats(*[{}] * 1000), limit=None).splitlines()) == 1001


@pytest.mark.slow
def test_a_rank_of_the_program_that_hangs_while_writing(toy: Toy, tmp_path: Path):
    saved = tmp_path / "saved"
    saved.mkdir()
    os.mkfifo(saved / ".step_000002.00001")  # nobody reads it: opening it for writing never returns
    tree = toy.tree(tmp_path / "run", run={"phase_timeout_minutes": 0.25}, debug={"save_rollouts": str(saved)})
    result = subprocess.run(command(tree, tmp_path, 2), env=environment(), capture_output=True, text=True, timeout=300)
    assert "late: rank 1 in write_rollouts of step 2" in result.stderr, result.stderr[-6000:]
    assert result.returncode == 1 and "exitcode  : 75" in result.stderr
    assert "write_part" in (tmp_path / "run" / "watchdog" / "attempt_0_rank_00001.txt").read_text()
    os.remove(saved / ".step_000002.00001")
