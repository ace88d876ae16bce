"""Logs metrics to Weights & Biases. WANDB_PROJECT, WANDB_MODE=offline and its other variables work as ever."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


class WandbTracker:
    """A run of wandb, whose files are in wandb/ of the run's folder. A resumed run goes on with the same wandb run.

    Args:
        run_id: names the run over its launches.
        options: the run's configuration, shown beside its curves.
    """

    def __init__(self, folder: Path, run_id: str | None, options: Mapping[str, Any]):
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lens_megatron"),
            id=run_id,
            name=folder.name,
            dir=str(folder),
            resume="allow",
            config=dict(options),
            settings=wandb.Settings(console="off", quiet=True),  # the console belongs to the run
        )
        # wandb's own step only grows and it drops what comes late, but steps are done again where a run resumes.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()
