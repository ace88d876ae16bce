"""Trains the arms one after the other, each as the command that a user would type, in a process of its own.

An arm that is done is not trained again, and one that was interrupted goes on, since a run does. Where sampled tokens
are the budget, an arm is stopped after the step that reaches it; had a further step ended by then, its checkpoint is
deleted and the arm goes back to the one before, so that all that is compared depends on no clock.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lens_megatron.files import write_atomically
from lens_megatron.output import run_folder
from lens_megatron.output.metrics import read_metrics
from lens_megatron.output.run_lease import FolderInUseError, refuse_if_in_use
from lens_megatron.policy import checkpoint_files
from lens_megatron.policy.checkpoint_files import EXPORT, folder_name
from lens_megatron.tools.compare import forks, processes
from lens_megatron.tools.compare.arms import TOKENS, Arm, progress, step_that_reaches
from lens_megatron.tools.compare.forks import ForkPoint
from lens_megatron.tools.compare.request import Budget, BudgetUnit, CompareError

logger = logging.getLogger(__name__)

POLL_S = 0.5
PATIENCE_S = 180.0
"""The time for which an arm's folder may be in use by ranks whose comparison was killed: they save, and end."""


def check_arm(arm: Arm, fork: ForkPoint, budget: Budget) -> None:
    """Checks an arm that was begun before. Raises CompareError where it has other options or has gone too far."""
    if not arm.folder.exists():
        return
    _wait_until_free(arm)
    try:
        run_folder.check(arm.config)
    except run_folder.RunFolderError as error:
        raise CompareError(f"{arm.name} was begun otherwise: {error}") from error
    here = progress(arm, fork, budget)
    if budget.unit is BudgetUnit.STEPS and here.last_step is not None and here.saved_step > here.last_step:
        raise CompareError(
            f"--budget {budget}: {arm.name} has gone {here.saved_step - fork.step} steps already; give at least as "
            "many, or another --out"
        )


def train_arms(arms: Sequence[Arm], fork: ForkPoint, budget: Budget, ranks: int) -> None:
    """Trains every arm to the end of the budget, with a progress bar on a terminal.

    Raises:
        CompareError: an arm ended before its end; what it printed last is in the message.
        RunFolderError, CheckpointError: the folder of an arm cannot be used.
    """
    with tqdm(total=len(arms) * budget.amount, unit=budget.unit.removesuffix("s"), disable=None) as bar:
        for number, arm in enumerate(arms):
            if not arm.folder.exists():
                forks.begin(fork, arm.config)
            if progress(arm, fork, budget).is_done:
                logger.info(f"{arm.name} is done")
            else:
                bar.set_description(arm.name)
                logger.info(f"{arm.name} trains; what it prints is in {_log(arm)}")
                _finish(arm, fork, budget, ranks, partial(_show, bar, number * budget.amount))
            _show(bar, number * budget.amount, budget.amount)


def _show(bar: tqdm, before: int, spent: int) -> None:
    bar.update(max(0, before + spent - bar.n))


def _finish(arm: Arm, fork: ForkPoint, budget: Budget, ranks: int, show: Callable[[int], None]) -> None:
    """Trains the arm to its end."""
    here = progress(arm, fork, budget)
    if here.last_step is None:
        _run(arm, ranks, arm.config.train.steps, _reached(arm, fork, budget, show))
        here = progress(arm, fork, budget)
        if here.last_step is None:
            raise CompareError(f"{arm.name} ended before it had sampled {budget.amount} tokens{_last_words(arm)}")
    if here.saved_step > here.last_step:
        _go_back(arm, fork, here.last_step)
    if not here.evaluated:
        _forget_export(arm, here.last_step)
    if not progress(arm, fork, budget).is_done:
        _run(arm, ranks, here.last_step, _reached(arm, fork, budget, show, watch=False))
    if not progress(arm, fork, budget).is_done:
        raise CompareError(f"{arm.name} ended before step {here.last_step}, its last{_last_words(arm)}")


def _reached(
    arm: Arm, fork: ForkPoint, budget: Budget, show: Callable[[int], None], *, watch: bool = True
) -> Callable[[], bool]:
    """Returns what is asked while an arm trains: shows how far it is, and says whether to stop it."""

    def look() -> bool:
        rows = [row for row in read_metrics(arm.folder) if row["step"] > fork.step]
        spent = len(rows) if budget.unit is BudgetUnit.STEPS else sum(row.get(TOKENS, 0) for row in rows)
        show(min(int(spent), budget.amount))
        return watch and step_that_reaches(rows, fork.step, budget) is not None

    return look


def _run(arm: Arm, ranks: int, last_step: int, is_enough: Callable[[], bool]) -> None:
    """Trains until the run ends; asks it to stop once `is_enough` says so, or when this process is asked to."""
    _wait_until_free(arm)
    settings = arm.folder.with_name(f"{arm.folder.name}.yaml")
    write_atomically(settings, run_folder.as_yaml(arm.config))
    words = ["lens_megatron", "--config", str(settings), f"train.steps={last_step}"]
    try:
        processes.run(ranks, words, _log(arm), is_enough)
    except BaseException:
        logger.warning(f"{arm.name} was stopped; the same command goes on from there")
        raise


def _wait_until_free(arm: Arm) -> None:
    """Waits for ranks that an earlier comparison left behind. Raises FolderInUseError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    told = False
    while True:
        try:
            return refuse_if_in_use(arm.folder)
        except FolderInUseError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                logger.warning(f"{arm.name}: {error}; waiting until it has stopped")
                told = True
        time.sleep(POLL_S)


def _go_back(arm: Arm, fork: ForkPoint, step: int) -> None:
    """Deletes the checkpoints of later steps than `step`; the fork's takes their place if there is none before."""
    folder = arm.folder / "checkpoints"
    for path in checkpoint_files.published(folder):
        if (checkpoint_files.step_of(path) or 0) > step:
            hidden = path.with_name(f".deleting_{path.name}")
            path.rename(hidden)  # a folder that is half deleted must not look like a checkpoint
            shutil.rmtree(hidden)
    if not checkpoint_files.published(folder):
        forks.put_checkpoint(fork, arm.config, arm.folder)


def _forget_export(arm: Arm, step: int) -> None:
    """Deletes hf/ of the checkpoint of `step`, if both are there.

    A run that has its last step with its export is complete and does nothing. One that lacks the export makes up for it
    and for the evaluation that a run stopped before its last step has not made.
    """
    shutil.rmtree(arm.folder / "checkpoints" / folder_name(step) / EXPORT, ignore_errors=True)


def _log(arm: Arm) -> Path:
    return arm.folder.with_name(f"{arm.folder.name}.log")


def _last_words(arm: Arm) -> str:
    return f"; the same command goes on from there. {processes.last_words(_log(arm))}"
