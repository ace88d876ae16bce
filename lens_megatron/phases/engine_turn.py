"""Gives the engine its weights and the device while it samples; the trainer has the device otherwise.

    weights to the engine -> trainer's state to the host -> engine awake -> sampling -> engine asleep -> trainer back

Weights come first because they are read from the trainer. State that need not move (embedded engine, CPU, servers, or
as configured) stays and costs nothing. After new weights, sync_check.py compares engine and trainer on a few tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from lens_megatron.phases import sync_check, weight_sync
from lens_megatron.policy.export import bytes_received, export_weights
from lens_megatron.results import SyncStats
from lens_megatron.rollout.engine import Completion
from lens_megatron.run import Run

Sampled = TypeVar("Sampled")


def renew_engine(run: Run) -> SyncStats | None:
    """Gives the policy's weights to an engine with memory of its own; None if it has them already. A collective.

    Raises WeightSyncError where engine and trainer disagree afterwards.
    """
    sync = _give_weights(run)
    if sync is None:
        return None
    run.engine.wake()
    return _checked(run, sync, _ask_engine(run))


def let_engine_sample(run: Run, sampling: Callable[[], Sampled]) -> tuple[Sampled, SyncStats | None]:
    """Returns what `sampling` returns, and the transfer of weights before it, None if the engine had them already.

    While `sampling` runs the engine samples from the policy, and the policy cannot be used. A collective. An error of
    `sampling` leaves the device as it is.

    Raises WeightSyncError where engine and trainer disagree: at once, or, if the trainer had to make room, afterwards.
    """
    sync = _give_weights(run)
    with run.clock("wake"):
        run.trainer_memory.to_host()
        run.engine.wake()
    answer = None if sync is None else _ask_engine(run)
    check_later = run.trainer_memory.is_away
    if sync is not None and not check_later:
        sync = _checked(run, sync, answer)
    sampled = sampling()
    with run.clock("sleep"):
        run.engine.sleep()
        run.trainer_memory.to_device()
    if sync is not None and check_later:
        sync = _checked(run, sync, answer)
    return sampled, sync


def _give_weights(run: Run) -> SyncStats | None:
    """Transfers the policy's weights. Returns None, on every rank, where the engine has them already."""
    if run.engine.version == run.policy.version:
        return None
    with run.clock("update_weights"):
        weights, received = export_weights(run.policy), bytes_received(run.policy)
        return weight_sync.push(weights, run.engine, run.policy.version, received)


def _ask_engine(run: Run) -> Completion | None:
    """Returns the engine's answer to a prompt of the data on the first of its ranks, and None on the others."""
    with run.clock("sync_check"), run.engine.phase():
        return sync_check.ask(run) if run.engine_group.leads else None


def _checked(run: Run, sync: SyncStats, answer: Completion | None) -> SyncStats:
    """Returns `sync` with the difference between engines and trainer. Raises WeightSyncError if that is too large."""
    with run.clock("sync_check"):
        return replace(sync, sync_difference=sync_check.check(run, answer))
