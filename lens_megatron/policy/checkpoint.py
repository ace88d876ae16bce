"""Saves and loads checkpoints: whole or not there, exact to the bit on the same layout, readable under any other.

    checkpoints/iter_0000020/rank_00000.safetensors   this rank's pieces of weights and optimizer; its generators
                             index.json               size and checksum of each file, place of each piece in its tensor
                             state.json               step, schedule, layout, metric, state of the selection
                             hf/                      the policy as a Hugging Face directory
    checkpoints/latest_checkpointed_iteration.txt     written last

A save copies everything to host memory; a thread writes the copies to a hidden folder, and when those of all ranks
are done, rank 0 renames it. The threads agree over a group of their own, so training goes on meanwhile. Checksums are
computed from the copies, and compared with every file before anything is loaded. Megatron's own torch_dist format is
not used because its metadata is a pickle; ours is safetensors and JSON, cut by Megatron's `sharded_state_dict`.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ReduceOp

from lens_megatron.algorithms.selection import Selection
from lens_megatron.data.model_files import small_files
from lens_megatron.files import flush, write_atomically
from lens_megatron.policy import checkpoint_files, hf_export, shards
from lens_megatron.policy.checked_files import DamageError
from lens_megatron.policy.checkpoint_files import (
    EXPORT,
    TRACKER,
    Checkpoint,
    CheckpointError,
    TrainingState,
    WrittenFiles,
    folder_name,
    published,
    rank_file,
    superfluous,
)
from lens_megatron.policy.hf_export import StagedExport
from lens_megatron.policy.model import Policy
from lens_megatron.policy.sharded_state import (
    generator_states,
    layout,
    local_pieces,
    optimizer_steps,
    restore,
    restore_generators,
)
from lens_megatron.policy.shards import Piece, ShardError, ShardReader
from lens_megatron.supervision.agreement import shared_failure

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)
"""The time that one rank's writer waits for the slowest; a rank that dies ends the wait at once."""
_FAILURES = (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Staged:
    """Holds copies in host memory, so that the next optimizer step does not change what is being written."""

    state: TrainingState
    pieces: list[tuple[Piece, Tensor]]
    generators: dict[str, Tensor]
    export: StagedExport | None
    """The policy as a Hugging Face directory; None where that is not to be written."""


class CheckpointWriter:
    """Saves into `folder`; at most one save is being written at a time. Building one is a collective.

    Args:
        model_path: configuration and tokenizer of every export are copied from there; they are read once, now.
        keep_last, keep_best: the numbers of checkpoints to keep: the newest, and the best by their metric.
        background: write in a thread while training goes on.
        selection: its state is saved too, as it is when `save` is called.
        before_publishing: called on rank 0 when all is written; an error raised there prevents the publication.

    Raises:
        CheckpointError: an optimizer or a module whose state cannot be saved; the model's small files cannot be read.
    """

    def __init__(
        self,
        policy: Policy,
        folder: Path,
        *,
        model_path: str,
        keep_last: int,
        keep_best: int,
        background: bool,
        before_publishing: Callable[[], None] | None = None,
        selection: Selection | None = None,
    ):
        self.policy, self.folder, self.background, self.selection = policy, folder, background, selection
        self.keep_last, self.keep_best, self.before_publishing = keep_last, keep_best, before_publishing
        self.saved_step = 0
        """The step of the last checkpoint that this writer published or that was loaded from `folder`."""
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        problem = _attempt(lambda: local_pieces(policy))
        if problem is not None:
            raise CheckpointError(f"this policy could not be saved: {problem}")
        self._small_files: dict[str, bytes] = {}
        if problem := self._agree(_attempt(lambda: self._prepare(model_path)) if policy.mesh.rank == 0 else None):
            raise CheckpointError(f"nothing could be saved to {folder}: {problem}")

    def _prepare(self, model_path: str) -> None:
        """Does rank 0's part: it tidies up after a process that was killed, and reads what every export needs."""
        _tidy(self.folder)
        self._small_files = small_files(model_path)

    def save(self, step: int, metric: float | None = None) -> None:
        """Copies the state after `step` and has it written. Raises CheckpointError, on every rank, as `poll` does."""
        self.poll(wait=True)
        staged = self._stage(step, metric)
        self._thread = threading.Thread(target=self._write, args=(staged,), name="checkpoint writer")
        self._thread.start()
        self.poll(wait=not self.background)

    def poll(self, *, wait: bool = False) -> None:
        """Takes note of a save that has been published, or could not be. A collective while one is being written.

        Raises CheckpointError on every rank when any rank could not write: then nothing was published.
        """
        if self._thread is None:
            return
        if wait:
            self._thread.join()
        done = torch.tensor([not self._thread.is_alive()], dtype=torch.int32, device=self.policy.mesh.device)
        torch.distributed.all_reduce(done, op=ReduceOp.MIN)
        if not done.item():
            return
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            raise CheckpointError(
                f"checkpoint not written to {self.folder}: {self._failure}; the checkpoints before it are untouched. "
                "Free space or permissions, then start the same command again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits for a save in flight, whatever ended the training. Not a collective of the training's ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                logger.warning(f"checkpoint not written to {self.folder}: {self._failure}")

    def _stage(self, step: int, metric: float | None) -> Staged:
        policy, selection = self.policy, self.selection
        export = hf_export.stage(policy, self._small_files)
        pieces = [(p.piece, p.tensor.to("cpu", copy=True)) for p in local_pieces(policy) if p.is_main_replica]
        steps = optimizer_steps(policy)
        state = TrainingState(
            step, policy.version, policy.scheduler.num_steps, steps, layout(), metric,
            selection.state() if selection else None, selection.epoch() if selection else None,
        )  # fmt: skip
        return Staged(state, pieces, generator_states(policy), export)

    def _write(self, staged: Staged) -> None:
        """Runs in the thread. It raises nothing: every rank must reach the agreements, or the others would wait."""
        step, main = staged.state.step, self.policy.mesh.rank == 0
        temporary = self.folder / f".writing_iter_{step:07d}"
        try:
            self._failure = self._agree(
                _attempt(lambda: _write_rank(temporary, self.policy.mesh.rank, staged), (Exception,))
            )
            if self._failure is None:
                self._failure = self._agree(
                    _attempt(lambda: self._publish(temporary, staged.state), (Exception,)) if main else None
                )
        except RuntimeError as error:  # gloo raises it when a rank dies
            self._failure = f"another rank was lost: {error}"
        if self._failure is None:
            self.saved_step = step
        elif main:
            _remove(temporary)

    def save_aside(self, staged: Staged, agree: Callable[[str | None], str | None], patience_s: float) -> str | None:
        """Saves `staged` from another thread than the one that calls `save`; returns the failure.

        A save in flight goes first, if it ends within `patience_s`. `agree` stands for this writer's own agreement,
        whose group a save in flight uses.
        """
        step, main = staged.state.step, self.policy.mesh.rank == 0
        temporary = self.folder / f".writing_aside_{step:07d}"
        failure = agree(_attempt(lambda: _write_rank(temporary, self.policy.mesh.rank, staged), (Exception,)))
        self.wait_for_save(patience_s)
        if failure is None:
            failure = agree(_attempt(lambda: self._publish(temporary, staged.state), (Exception,)) if main else None)
        if main and failure is not None:
            _remove(temporary)
        return failure

    def wait_for_save(self, seconds: float) -> None:
        """Waits until a save in flight has ended or `seconds` have passed; any thread may call it."""
        writing = self._thread
        if writing is not None:
            writing.join(seconds)

    def _agree(self, failure: str | None) -> str | None:
        return shared_failure(failure, self._group, "this rank's part of the checkpoint could not be written")

    def _publish(self, temporary: Path, state: TrainingState) -> None:
        checkpoint_files.write_index(temporary, state)
        flush(temporary)
        if self.before_publishing:
            self.before_publishing()
        _replace(self.folder / folder_name(state.step), temporary)
        write_atomically(self.folder / TRACKER, f"{state.step}\n")
        # Later steps are damaged and were passed over: if they counted, they would crowd out the one just written.
        past = [(c.path, c.state) for c in checkpoint_files.whole(self.folder) if c.state.step <= state.step]
        for path in superfluous(past, self.keep_last, self.keep_best):
            _delete(path)


def resume(
    policy: Policy, folder: Path, restore_selection: Callable[[TrainingState], None] | None = None
) -> TrainingState | None:
    """Loads the newest checkpoint that all ranks can read, with a line for each that was passed over. A collective.

    Every file is compared with its checksum, by one of the ranks, before anything is loaded. Weights, optimizer and
    schedule load under any layout; the generators' states only under the one that wrote them. `restore_selection` puts
    the selection's state back, and may raise DamageError.
    Returns None when there is no checkpoint. Raises CheckpointError when there are some and none can be read.
    """
    paths = published(folder)
    for path in reversed(paths):
        checkpoint = _together(policy, path, partial(_verified, policy, path))
        if checkpoint is None:
            continue
        if policy.mesh.rank == 0 and not checkpoint.has_checksums:
            logger.warning(f"checkpoint {path} has no checksums, only sizes; it was saved by an older version")
        if _together(policy, path, partial(_load, policy, checkpoint, restore_selection)) is None:
            continue
        state = checkpoint.state
        policy.version = state.version
        policy.scheduler.num_steps = 0
        policy.scheduler.step(increment=state.scheduler_steps)
        return state
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be used, see above (all that is wrong: "
            f"python -m lens_megatron.doctor --checkpoint {folder}); restore one from a copy, start another run with "
            "model.path at an hf/ folder, or set run.if_exists=restart, which moves this run aside"
        )
    return None


def _together(policy: Policy, path: Path, action: Callable[[], _Result]) -> _Result | None:
    """Returns the result, or None on every rank if `action` failed on any; those log why. A collective."""
    results: list[_Result] = []
    failure = _attempt(lambda: results.append(action()))
    if failure is not None:
        logger.warning(f"checkpoint {path} cannot be used: {failure}; trying the one before it")
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=policy.mesh.device)
    torch.distributed.all_reduce(failed, op=ReduceOp.MAX)
    return None if failed.item() else results[0]


def _verified(policy: Policy, path: Path) -> Checkpoint:
    checkpoint = checkpoint_files.inspect(path)
    checkpoint_files.verify(checkpoint, policy.mesh.rank, policy.mesh.world_size)
    return checkpoint


def layout_change(state: TrainingState) -> str:
    """Returns what differs, such as "world_size 1 -> 2"; an empty text when `state` was saved on the present layout."""
    old = state.layout
    return ", ".join(f"{name} {old.get(name)} -> {size}" for name, size in layout().items() if old.get(name) != size)


def _load(
    policy: Policy, checkpoint: Checkpoint, restore_selection: Callable[[TrainingState], None] | None
) -> TrainingState:
    state = checkpoint.state
    if restore_selection is not None:
        restore_selection(state)
    with ShardReader(checkpoint.path, checkpoint.index.pieces) as reader:
        restore(policy, reader, state.optimizer_steps)
        if state.layout == layout():
            own = rank_file(policy.mesh.rank)
            restore_generators({name: reader.other(own, name) for name in reader.other_names(own)})
    return state


def _write_rank(folder: Path, rank: int, staged: Staged) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = rank_file(rank)
    files = {name: shards.write_file(folder / name, staged.pieces, staged.generators)}
    export = hf_export.write(staged.export, folder / EXPORT) if staged.export else {}
    checkpoint_files.write_receipt(folder, rank, WrittenFiles(files, export))


def _replace(final: Path, temporary: Path) -> None:
    """Puts `temporary` in the place of `final`, which may be there: the step has been trained and saved again.

    Raises OSError: then the old one is in its place. A process killed in between leaves that to `_tidy`.
    """
    aside = final.with_name(f".replaced_{final.name}")
    old = os.path.lexists(final)
    if old:
        _remove(aside)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if old:
            aside.rename(final)
        raise
    flush(final.parent)
    _remove(aside)


def _tidy(folder: Path) -> None:
    """Removes what a killed process has left half written or half deleted; puts back what it was about to replace."""
    for aside in folder.glob(".replaced_*"):
        final = folder / aside.name.removeprefix(".replaced_")
        if not os.path.lexists(final):
            aside.rename(final)
    for pattern in (".writing_*", ".deleting_*", ".replaced_*"):
        for leftover in folder.glob(pattern):
            _remove(leftover)


def _delete(path: Path) -> None:
    """Renames the folder before deleting it, so that one that is half deleted does not look like a checkpoint."""
    hidden = path.with_name(f".deleting_{path.name}")
    _remove(hidden)
    path.rename(hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    """Removes what can be removed; it removes a link itself, not the folder that a user keeps elsewhere."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _attempt(action: Callable[[], object], failures: tuple[type[Exception], ...] = _FAILURES) -> str | None:
    """Runs `action`; returns the message of a failure instead of raising, so that ranks can agree."""
    try:
        action()
    except failures as error:
        return str(error) if isinstance(error, (DamageError, ShardError)) else f"{type(error).__name__}: {error}"
    return None
