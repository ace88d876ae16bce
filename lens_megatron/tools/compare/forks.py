"""The checkpoint that all arms begin from, and the folder of an arm that begins there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.algorithms.selection import SelectionFactory
from lens_megatron.config import Config
from lens_megatron.config.files import merge
from lens_megatron.files import write_atomically
from lens_megatron.output import run_folder
from lens_megatron.output.metrics import read_metrics
from lens_megatron.output.run_folder import RunFolderError
from lens_megatron.policy import checkpoint_files
from lens_megatron.policy.checked_files import DamageError
from lens_megatron.policy.checkpoint_files import TRACKER, Checkpoint, TrainingState, folder_name
from lens_megatron.tools.compare.request import CompareError
from lens_megatron.types import Prompt

POSITION = "position"
"""In the state of a selection that goes through the data in order: the number of prompts that it has passed."""


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """A checkpoint of a run, with the options that the run had."""

    run: Path
    checkpoint: Checkpoint
    options: Mapping[str, Any]
    """The run's config.yaml, as nested mappings."""

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"

    @property
    def step(self) -> int:
        return self.checkpoint.state.step

    @property
    def seed(self) -> int:
        section = self.options.get("run")
        seed = section.get("seed") if isinstance(section, Mapping) else None
        return seed if isinstance(seed, int) else 0

    @property
    def world_size(self) -> int:
        """The number of processes that saved the checkpoint."""
        return self.checkpoint.state.layout["world_size"]

    @property
    def bytes(self) -> int:
        """The size of the checkpoint with its export, which every later checkpoint of the model has, too."""
        index = self.checkpoint.index
        return sum(record.size for record in (*index.files.values(), *index.export.values()))

    @property
    def identity(self) -> str:
        """Tells this checkpoint from another one of the same name: the checksums of its files."""
        files = self.checkpoint.index.files
        return "/".join(f"{record.checksum or record.size}" for _, record in sorted(files.items()))


def find_fork(text: str) -> ForkPoint:
    """Finds RUN@STEP. Raises CompareError where there is no such run or checkpoint, or it cannot be used."""
    name, separator, number = text.rpartition("@")
    if not separator or not name or not number.isdecimal():
        raise CompareError(f"--fork {text!r}: expected RUN@STEP, the folder of a run and a step, such as runs/mine@40")
    run, step = Path(name).expanduser().absolute(), int(number)
    try:
        options = run_folder.read_options(run)
    except RunFolderError as error:
        why = "there is no such folder" if not run.is_dir() else str(error)
        raise CompareError(f"--fork {text}: {run} is no run to begin from: {why}") from error
    path = run / "checkpoints" / folder_name(step)
    if not path.is_dir():
        steps = [str(checkpoint_files.step_of(found)) for found in checkpoint_files.published(run / "checkpoints")]
        raise CompareError(
            f"--fork {text}: {run} has no checkpoint of step {step}; it has those of step {', '.join(steps) or 'none'}"
            "; a run keeps the train.save_total_limit newest ones"
        )
    try:
        return ForkPoint(run, checkpoint_files.inspect(path), options)
    except DamageError as error:
        raise CompareError(
            f"--fork {text}: the checkpoint {path} cannot be used: {error}; take another step, or restore it from a "
            "copy (python -m lens_megatron.doctor --checkpoint reads every file)"
        ) from error


def begin(fork: ForkPoint, config: Config) -> None:
    """Makes the folder of an arm, `run.directory`, whose newest checkpoint is the fork's.

    It also has the run's metrics up to the fork, so that the arm's curve begins where the run's began.
    Raises RunFolderError, CompareError.
    """
    run_folder.begin_fork(config, str(fork), lambda folder: _fill(fork, config, folder))


def put_checkpoint(fork: ForkPoint, config: Config, folder: Path) -> None:
    """Puts the fork's checkpoint into the folder of an arm. Raises CompareError, OSError."""
    state = state_for(fork, config)
    try:
        checkpoint_files.copy_with_state(fork.checkpoint, folder / "checkpoints" / folder_name(fork.step), state)
    except DamageError as error:
        raise CompareError(f"{fork}: {error}; restore the checkpoint from a copy, or take another step") from error
    write_atomically(folder / "checkpoints" / TRACKER, f"{fork.step}\n")


def _fill(fork: ForkPoint, config: Config, folder: Path) -> None:
    (folder / "rollouts").mkdir()
    put_checkpoint(fork, config, folder)
    rows = [row for row in read_metrics(fork.run) if row["step"] <= fork.step]
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def state_for(fork: ForkPoint, config: Config) -> TrainingState:
    """Returns the fork's state with the state that the arm's selection begins with.

    The same selection with the same options goes on with what the run's remembers. Another one begins anew at the same
    position in the data. Raises CompareError where that is not possible.
    """
    state, section = fork.checkpoint.state, config.selection
    before = merge({"method": section.method, "options": {}}, fork.options.get("selection") or {})
    if (before["method"], before["options"]) == (section.method, section.options):
        return state
    old = state.selection
    if old is None:
        old = {POSITION: state.step * config.rollout.prompts_per_step}  # as versions without a state took prompts
    new = _first_state(load_methods(config).selection, config.run.seed)
    if POSITION not in old or POSITION not in new:
        raise CompareError(
            f"selection.method={section.method} cannot take over the place in the data from selection.method="
            f"{before['method']} of {fork}: one of them has no {POSITION!r} in its state; fork with the run's own"
        )
    return replace(state, selection=new | {POSITION: old[POSITION]})


def _first_state(selection: Method[SelectionFactory], seed: int) -> dict[str, Any]:
    try:
        return dict(selection.call(_NoPrompts(), seed, selection.options).state())
    except LookupError as error:
        raise CompareError(
            f"selection.method={selection.name} reads prompts before its first step, so that a fork cannot know its "
            "first state; fork a run that has this selection already"
        ) from error


class _NoPrompts:
    """The source of prompts of a selection of which only the first state is wanted: that depends on no prompt."""

    @property
    def epoch_length(self) -> int:
        raise LookupError("no prompts are loaded")

    def at(self, position: int) -> Prompt:
        raise LookupError("no prompts are loaded")
