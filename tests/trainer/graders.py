"""Graders for tests with verl's signature: they pay for something a random model does half of the time."""

import os
import signal
import time
from pathlib import Path


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """1 when the number of characters is even."""
    return float(len(solution_str) % 2 == 0)


def patient_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """As `compute_score`, but says with a file `waits` in the folder PATIENCE that it waits for a file `go` there."""
    folder = Path(os.environ["PATIENCE"])
    while not (folder / "go").exists():
        (folder / "waits").touch()
        time.sleep(0.01)
    return float(len(solution_str) % 2 == 0)


def murderous_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Kills the trainer once it has kept a group of step 2, if the folder MURDER holds a file `armed`.

    It waits for the checkpoint of step 1, which is written while step 2 is sampled.
    """
    folder = Path(os.environ["MURDER"])
    kept = [path for path in folder.glob("run/unfinished/step_000002_*") if path.stat().st_size]
    if kept and (folder / "armed").exists():
        kill_trainer(folder, after=1)
    return float(len(solution_str) % 2 == 0)


def late_murderous_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None
) -> float:
    """Kills the trainer in step 3, once the checkpoint of step 2 is there, if MURDER holds a file `armed`."""
    folder = Path(os.environ["MURDER"])
    if (folder / "run" / "rollouts" / "step_000002.jsonl").exists() and (folder / "armed").exists():
        kill_trainer(folder, after=2)
    return float(len(solution_str) % 2 == 0)


def kill_trainer(folder: Path, after: int) -> None:
    """Waits for the checkpoint of step `after`, disarms, and kills the trainer that started this grading process."""
    while not (folder / "run" / "checkpoints" / f"iter_{after:07d}").exists():
        time.sleep(0.01)
    (folder / "armed").unlink(missing_ok=True)
    os.kill(parent(os.getppid()), signal.SIGKILL)  # the parent itself is the keeper


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
