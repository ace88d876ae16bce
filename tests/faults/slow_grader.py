"""A grader that gets stuck once a run has done a step, until the file `stuck` has gone."""

import os
import time
from pathlib import Path


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    folder = Path(os.environ["STUCK_FOLDER"])
    metrics = folder / "run" / "metrics.jsonl"
    if metrics.exists() and '"step": 1' in metrics.read_text():
        (folder / "reached").touch()
        while (folder / "stuck").exists():
            time.sleep(0.1)
    return float(len(solution_str) % 2 == 0)
