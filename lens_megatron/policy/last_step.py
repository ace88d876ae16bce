"""Keeps the last finished step ready for another thread to save while the main one is anywhere in the next step.

Such a checkpoint lacks hf/, which takes a collective of the main threads; the next save has it again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lens_megatron.policy.checkpoint import CheckpointWriter, Staged
from lens_megatron.policy.checkpoint_files import TrainingState
from lens_megatron.policy.guard import FinishedStep
from lens_megatron.policy.model import Policy
from lens_megatron.policy.offload import TrainerMemory
from lens_megatron.policy.sharded_state import (
    LocalPiece,
    generator_states,
    layout,
    local_pieces,
    optimizer_steps,
    optimizers,
)

SAVE_PATIENCE_S = 10.0
"""Seconds that a stop waits for a save in flight."""


class PolicyLastStep:
    """Implements `supervision.stop.LastStep` for this rank's part of the policy.

    Args:
        abandon: called before the process ends.
    """

    def __init__(self, policy: Policy, memory: TrainerMemory, saver: CheckpointWriter, abandon: Callable[[], None]):
        self.policy, self.memory, self.saver, self.abandon = policy, memory, saver, abandon

    def finish(self, step: int, metric: float | None = None) -> None:
        """Takes note of the state after `step`, from the main thread, when all else that the step leaves is written."""
        policy, selection = self.policy, self.saver.selection
        pieces = [local for local in local_pieces(policy) if local.is_main_replica]
        policy.guard.finish(
            FinishedStep(
                step=step,
                version=policy.version,
                scheduler_steps=policy.scheduler.num_steps,
                optimizer_steps=optimizer_steps(policy),
                metric=metric,
                pieces=tuple((local.piece, _kept(policy, local)) for local in pieces),
                generators=generator_states(policy),
                selection=selection.state() if selection else None,
                epoch=selection.epoch() if selection else None,
            )
        )

    def hold(self, seconds: float) -> int | None:
        """Keeps weights and optimizer as they are and returns their step; None where that takes over `seconds`."""
        guard = self.policy.guard
        if not guard.lock.acquire(timeout=seconds):
            return None
        if guard.finished is None:
            guard.lock.release()
            return None
        return guard.finished.step

    def release(self) -> None:
        """Lets weights and optimizer change again after a successful `hold`."""
        self.policy.guard.lock.release()

    def is_saved(self) -> bool:
        """Returns whether the held step is in a checkpoint; waits for a save in flight."""
        step = self._held().step
        if step > self.saver.saved_step:
            self.saver.wait_for_save(SAVE_PATIENCE_S)
        return step <= self.saver.saved_step

    def save(self, agree: Callable[[str | None], str | None]) -> str | None:
        """Saves the held step and returns what failed on this rank or another. `agree` is a collective of all ranks."""
        failure: str | None = None
        staged: Staged | None = None
        try:
            staged = self._stage(self._held())
        except Exception as error:  # the other ranks wait, so they must hear of any error
            failure = f"{type(error).__name__}: {error}"
        failure = agree(failure)
        if failure is not None or staged is None:
            return failure
        return self.saver.save_aside(staged, agree, SAVE_PATIENCE_S)

    def _held(self) -> FinishedStep:
        finished = self.policy.guard.finished
        if finished is None:
            raise RuntimeError("no finished step is held; call hold() first and go on only if it returns a step")
        return finished

    def _stage(self, finished: FinishedStep) -> Staged:
        with _own_stream(self.policy.mesh.device):
            pieces = [(piece, self.memory.read(tensor)) for piece, tensor in finished.pieces]
        state = TrainingState(
            finished.step, finished.version, finished.scheduler_steps, finished.optimizer_steps, layout(),
            finished.metric, finished.selection, finished.epoch,
        )  # fmt: skip
        return Staged(state, pieces, finished.generators, None)


def _kept(policy: Policy, local: LocalPiece) -> Tensor:
    """Returns the live tensor, or where the optimizer gives a copy, that copy in host memory: it stays a whole step."""
    copies = any(optimizer.config.use_precision_aware_optimizer for optimizer in optimizers(policy))
    return local.tensor.to("cpu") if copies and not local.piece.key.startswith("model/") else local.tensor


def _own_stream(device: torch.device) -> AbstractContextManager:
    """Leaves the main thread's stream, which may wait for other ranks for minutes."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.set_device(device)  # this sets the device of this thread
    return torch.cuda.stream(torch.cuda.Stream(device))


def is_exported(folder: Path, step: int) -> bool:
    """Returns whether the checkpoint of `step` in `folder` has its Hugging Face directory."""
    return (folder / f"iter_{step:07d}" / "hf").is_dir()
