"""Opens the trackers that `run.trackers` names."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lens_megatron.config import Config, ConfigError
from lens_megatron.output.run_folder import MARKER
from lens_megatron.output.trackers.tensorboard_tracker import TensorBoardTracker
from lens_megatron.output.trackers.tracker import GuardedTracker, Tracker
from lens_megatron.output.trackers.trackio_tracker import TrackioTracker
from lens_megatron.output.trackers.wandb_tracker import WandbTracker

logger = logging.getLogger(__name__)

INSTALL = {"wandb": "pip install 'wandb>=0.31'", "trackio": "pip install 'trackio>=0.43'"}
"""What installs the libraries that do not come with the project."""


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError if a tracker's library is not installed. Loads none of them."""
    for name in names:
        if name in INSTALL and find_spec(name) is None:
            raise ConfigError(
                f"run.trackers: {name}: it is not installed; {INSTALL[name]}, or leave it out of run.trackers"
            )


def open_trackers(config: Config, first_step: int) -> tuple[Tracker, ...]:
    """Opens the trackers of a run; call it on rank 0 only.

    One that cannot be opened, because a login or the network is missing, causes a warning: the run does without.
    """
    folder = Path(config.run.directory)
    run_id, options = _run_id(folder), config.model_dump(mode="json")
    makers: Mapping[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(folder, first_step),
        "wandb": lambda: WandbTracker(folder, run_id, options),
        "trackio": lambda: TrackioTracker(folder, run_id, options),
    }
    opened = ((name, _opened(name, makers[name])) for name in dict.fromkeys(config.run.trackers))
    return tuple(GuardedTracker(name, tracker) for name, tracker in opened if tracker is not None)


def _opened(name: str, make: Callable[[], Tracker]) -> Tracker | None:
    try:
        return make()
    except Exception as error:  # of a library, which may raise anything
        logger.warning(f"{name} cannot be opened: {type(error).__name__}: {error}; training goes on without it")
        return None


def _run_id(folder: Path) -> str | None:
    """Returns what names the run over its launches; None where the folder does not say."""
    try:
        marker: Any = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker.get("id") if isinstance(marker, dict) else None
