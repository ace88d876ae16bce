"""Logs metrics to trackio, which keeps them on this machine: `trackio show` draws them, TRACKIO_DIR says where."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


class TrackioTracker:
    """A run of trackio. A resumed run goes on with the same trackio run, and the steps it does again have two values.

    Args:
        run_id: tells runs apart whose folders have the same name.
        options: the run's configuration.
    """

    def __init__(self, folder: Path, run_id: str | None, options: Mapping[str, Any]):
        trackio = import_module("trackio")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "lens_megatron"),
            name=f"{folder.name}-{run_id}" if run_id else folder.name,
            resume="allow",
            config=dict(options),
            embed=False,  # it is for notebooks
            auto_log_cpu=False,  # perf/* says what the run takes; other processes of the machine are not its matter
            auto_log_gpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
