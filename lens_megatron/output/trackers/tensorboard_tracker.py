"""Writes metrics as TensorBoard's event files into tensorboard/ of the run."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from lens_megatron.output import tensorboard_events
from lens_megatron.output.side_log import SideLog


class TensorBoardTracker:
    """An event file. One that cannot be written causes a warning, and is written later: see `side_log.SideLog`.

    Args:
        first_step: TensorBoard drops the values of earlier files from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._events = SideLog(folder / "tensorboard" / name, tensorboard_events.head(first_step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._events.append(tensorboard_events.scalars(step, metrics))

    def close(self) -> None:
        self._events.close()
