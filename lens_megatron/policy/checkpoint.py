"""Checkpoints that are whole or not there, exact to the bit on the same layout, readable under any other.

    checkpoints/iter_0000020/rank_00000.safetensors   this rank's pieces of weights and optimizer; its generators
                             index.json               file sizes, and where each piece stands in its global tensor
                             state.json               step, schedule, layout, metric
                             hf/                      the policy as a Hugging Face directory
    checkpoints/latest_checkpointed_iteration.txt     written last

A save copies everything to host memory; a thread writes the copies to a hidden folder, and when those of all ranks
are done, rank 0 renames it. The threads agree over a group of their own, so training goes on meanwhile. Megatron's own
torch_dist format is not used because its metadata is a pickle; ours is safetensors and JSON, cut by Megatron's
`sharded_state_dict`.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ReduceOp

from lens_megatron.policy import hf_export, shards
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

TRACKER = "latest_checkpointed_iteration.txt"
_PATIENCE = timedelta(hours=6)
"""How long one rank's writer waits for the slowest; a rank that dies ends the wait at once."""
_FAILURES = (OSError, ValueError, KeyError, TypeError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; earlier ones are untouched."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """state.json: what resuming needs besides tensors. Data cursor and seeds are functions of `step`."""

    step: int
    """Steps done."""
    version: int
    scheduler_steps: int
    optimizer_steps: int
    layout: dict[str, int]
    metric: float | None = None
    """What `keep_best` compares, higher is better; None where nothing was evaluated."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Copies in host memory: the next optimizer step must not reach what is being written."""

    state: TrainingState
    pieces: list[tuple[Piece, Tensor]]
    generators: dict[str, Tensor]
    export: StagedExport | None
    """None where the policy is not to be written as a Hugging Face directory."""


class CheckpointWriter:
    """Saves into `folder`; at most one save is being written at a time. Building one is a collective.

    Args:
        keep_last, keep_best: newest checkpoints to keep, and best ones by their metric besides.
        background: write in a thread while training goes on.
        before_publishing: called on rank 0 when all is written; raises to prevent that it takes its place.

    Raises:
        CheckpointError: an optimizer or a module whose state cannot be saved.
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
    ):
        self.policy, self.folder, self.model_path, self.background = policy, folder, model_path, background
        self.keep_last, self.keep_best, self.before_publishing = keep_last, keep_best, before_publishing
        self.saved_step = 0
        """The last one published by this writer, or loaded from `folder`."""
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        problem = _attempt(lambda: local_pieces(policy))
        if problem is not None:
            raise CheckpointError(f"this policy could not be saved: {problem}")
        if policy.mesh.rank == 0:
            for leftover in [*folder.glob(".writing_*"), *folder.glob(".deleting_*")]:
                shutil.rmtree(leftover, ignore_errors=True)
        torch.distributed.barrier()

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
                print(f"checkpoint not written to {self.folder}: {self._failure}", flush=True)

    def _stage(self, step: int, metric: float | None) -> Staged:
        policy = self.policy
        export = hf_export.stage(policy, self.model_path)
        pieces = [(p.piece, p.tensor.to("cpu", copy=True)) for p in local_pieces(policy) if p.is_main_replica]
        steps = optimizer_steps(policy)
        state = TrainingState(step, policy.version, policy.scheduler.num_steps, steps, layout(), metric)
        return Staged(state, pieces, generator_states(policy), export)

    def _write(self, staged: Staged) -> None:
        """The thread. It raises nothing: every rank must reach the agreements, or the others would wait."""
        step, main = staged.state.step, self.policy.mesh.rank == 0
        temporary = self.folder / f".writing_iter_{step:07d}"
        try:
            self._failure = self._agree(
                _attempt(lambda: _write_rank(temporary, self.policy.mesh.rank, staged), Exception)
            )
            if self._failure is None:
                self._failure = self._agree(
                    _attempt(lambda: self._publish(temporary, staged.state), Exception) if main else None
                )
        except RuntimeError as error:  # gloo's, when a rank dies
            self._failure = f"another rank was lost: {error}"
        if self._failure is None:
            self.saved_step = step
        elif main:
            shutil.rmtree(temporary, ignore_errors=True)

    def save_aside(self, staged: Staged, agree: Callable[[str | None], str | None], patience_s: float) -> str | None:
        """Saves `staged` from another thread than the one that calls `save`; returns the failure.

        A save in flight goes first, if it ends within `patience_s`. `agree` stands for this writer's own agreement,
        whose group a save in flight uses.
        """
        step, main = staged.state.step, self.policy.mesh.rank == 0
        temporary = self.folder / f".writing_aside_{step:07d}"
        failure = agree(_attempt(lambda: _write_rank(temporary, self.policy.mesh.rank, staged), Exception))
        self.wait_for_save(patience_s)
        if failure is None:
            failure = agree(_attempt(lambda: self._publish(temporary, staged.state), Exception) if main else None)
        if main and failure is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        return failure

    def wait_for_save(self, seconds: float) -> None:
        """Until a save in flight has ended, or `seconds` have passed. From any thread."""
        writing = self._thread
        if writing is not None:
            writing.join(seconds)

    def _agree(self, failure: str | None) -> str | None:
        """The failure of this rank or of another, None when all ranks succeeded."""
        failed = torch.tensor([failure is not None], dtype=torch.int32)
        torch.distributed.all_reduce(failed, op=ReduceOp.MAX, group=self._group)
        if failure is not None and self.policy.mesh.rank != 0:
            print(f"rank {self.policy.mesh.rank} could not write its checkpoint: {failure}", flush=True)
        return failure or ("another rank failed" if failed.item() else None)

    def _publish(self, temporary: Path, state: TrainingState) -> None:
        files = [f"rank_{rank:05d}.safetensors" for rank in range(state.layout["world_size"])]
        _write_json(temporary / shards.INDEX, shards.make_index(temporary, files), indent=None)
        _write_json(temporary / "state.json", asdict(state))
        _flush(temporary)
        if self.before_publishing:
            self.before_publishing()
        final = self.folder / f"iter_{state.step:07d}"
        _delete(final)
        temporary.rename(final)
        _flush(self.folder)
        partial = self.folder / f".{TRACKER}"
        partial.write_text(f"{state.step}\n")
        _flush(partial)
        partial.rename(self.folder / TRACKER)
        _flush(self.folder)
        # Later steps are damaged ones that were passed over: counted, they would crowd out the one just written.
        past = [(path, old) for path, old in _readable_states(self.folder) if old.step <= state.step]
        for path in superfluous(past, self.keep_last, self.keep_best):
            _delete(path)


def superfluous(states: Sequence[tuple[Path, TrainingState]], keep_last: int, keep_best: int) -> list[Path]:
    """Of checkpoints, oldest first: those neither among the newest nor among the best. Newer beats equal."""
    kept = {path for path, _ in states[-keep_last:]}
    scored = [(state.metric, state.step, path) for path, state in states if state.metric is not None]
    kept |= {path for *_, path in sorted(scored, reverse=True)[:keep_best]}
    return [path for path, _ in states if path not in kept]


def published(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("iter_*") if (path / "state.json").is_file())


def read_state(path: Path) -> TrainingState:
    return TrainingState(**json.loads((path / "state.json").read_text()))


def steps_saved(folder: Path) -> int:
    """Steps done by the newest checkpoint whose files are all there and whole; 0 when there is none."""
    for path in reversed(published(folder)):
        try:
            shards.check_sizes(path)
            return read_state(path).step
        except _FAILURES:
            continue
    return 0


def resume(policy: Policy, folder: Path) -> TrainingState | None:
    """Loads the newest checkpoint that all ranks can read, with a line for each that was passed over. A collective.

    Weights, optimizer and schedule load under any layout; the generators' states only under the one that wrote them.
    Returns None when there is no checkpoint. Raises CheckpointError when there are some and none can be read.
    """
    mesh = policy.mesh
    paths = published(folder)
    for path in reversed(paths):
        result: list = []
        failure = _attempt(lambda path=path, result=result: result.append(_load(policy, path)))
        if failure is not None:
            print(f"checkpoint {path} cannot be used: {failure}; trying the one before it", flush=True)
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=mesh.device)
        torch.distributed.all_reduce(failed, op=ReduceOp.MAX)
        if failed.item():
            continue
        state, generators = result[0]
        if generators:
            restore_generators(generators)
        policy.version = state.version
        policy.scheduler.num_steps = 0
        policy.scheduler.step(increment=state.scheduler_steps)
        return state
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be used, see above; restore one, start a new run "
            "from an hf/ folder, or set run.if_exists=restart to move this run aside"
        )
    return None


def layout_change(state: TrainingState) -> str:
    """E.g. "world_size 1 -> 2"; empty when `state` was saved on the layout of now."""
    old = state.layout
    return ", ".join(f"{name} {old.get(name)} -> {size}" for name, size in layout().items() if old.get(name) != size)


def _load(policy: Policy, path: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    state, mesh = read_state(path), policy.mesh
    shards.check_sizes(path, mesh.rank, mesh.world_size)
    with ShardReader(path) as reader:
        restore(policy, reader, state.optimizer_steps)
        if state.layout != layout():
            return state, {}
        own = f"rank_{mesh.rank:05d}.safetensors"
        return state, {name: reader.other(own, name) for name in reader.other_names(own)}


def _readable_states(folder: Path) -> Iterator[tuple[Path, TrainingState]]:
    for path in published(folder):
        try:
            yield path, read_state(path)
        except _FAILURES:
            continue  # not ours to delete: the user may want to mend it


def _write_rank(folder: Path, rank: int, staged: Staged) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05d}.safetensors"
    shards.write_file(path, staged.pieces, staged.generators)
    exported = [*hf_export.write(staged.export, folder / "hf"), folder / "hf"] if staged.export else []
    for written in [path, *exported]:
        _flush(written)


def _delete(path: Path) -> None:
    """By renaming first: a folder that is killed half deleted must not look like a checkpoint."""
    if path.exists():
        hidden = path.with_name(f".deleting_{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _write_json(path: Path, content: dict, indent: int | None = 1) -> None:
    path.write_text(json.dumps(content, indent=indent) + "\n")
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _attempt(action: Callable[[], object], failures: tuple | type = _FAILURES) -> str | None:
    """Runs `action`; returns the message of a failure instead of raising, so that ranks can agree."""
    try:
        action()
    except failures as error:
        return str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
    return None
