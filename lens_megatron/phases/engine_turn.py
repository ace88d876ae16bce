"""Whose the device is: the trainer's, but for the phases in which the engine samples.

    weights to the engine -> trainer's state to the host -> engine awake -> sampling -> engine asleep -> trainer back
                                                                         (or following)

Weights come first because they are read from the trainer. Whatever need not move (embedded engine, CPU, servers, or as
configured) stays, and costs nothing. After new weights, sync_check.py compares engine and trainer on a few tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lens_megatron.phases import sync_check, weight_sync
from lens_megatron.policy.export import bytes_received, export_weights
from lens_megatron.rollout.engine import Completion
from lens_megatron.rollout.vllm.tensor_parallel import TensorParallelEngine
from lens_megatron.run import Run


def renew_engine(run: Run) -> None:
    """The policy's weights to an engine with memory of its own, unless it has them. A collective.

    Raises WeightSyncError where engine and trainer then disagree.
    """
    if _give_weights(run):
        run.engine.wake()
        _compare(run, _ask_engine(run))


@contextmanager
def engine_awake(run: Run) -> Iterator[None]:
    """Within the block the engine can sample from the policy, and the policy cannot be used. A collective.

    Of an engine over several ranks the first samples within the block; the others enter it when that is done, and must
    find nothing to do there: a collective of both would hang. An error within the block leaves the device as it is.

    Raises WeightSyncError where engine and trainer disagree: at once, or, if the trainer had to make room, afterwards.
    """
    renewed = _give_weights(run)
    with run.clock("wake"):
        run.trainer_memory.to_host()
        run.engine.wake()
    answer = _ask_engine(run) if renewed else None
    if renewed and not run.trainer_memory.is_away:
        _compare(run, answer)
        renewed = False
    # As many phases on the rank that leads as on those that follow, or the watchdog would take some to be late.
    if isinstance(run.engine, TensorParallelEngine) and not run.engine_group.leads:
        with run.clock("gen"):
            run.engine.follow()
    yield
    if isinstance(run.engine, TensorParallelEngine) and run.engine_group.leads:
        with run.clock("gen"):
            run.engine.dismiss()
    with run.clock("sleep"):
        run.engine.sleep()
        run.trainer_memory.to_device()
    if renewed:
        _compare(run, answer)


def _give_weights(run: Run) -> bool:
    """False where the engine has them already, on every rank then."""
    if run.engine.version == run.policy.version:
        return False
    with run.clock("update_weights"):
        weights, received = export_weights(run.policy), bytes_received(run.policy)
        run.last_sync.stats = weight_sync.push(weights, run.engine, run.policy.version, received)
    return True


def _ask_engine(run: Run) -> Completion | None:
    """The engine's answer, on the rank that leads it."""
    with run.clock("sync_check"):
        if isinstance(run.engine, TensorParallelEngine):
            run.engine.follow()
        answer = sync_check.ask(run) if run.engine_group.leads else None
        if isinstance(run.engine, TensorParallelEngine):
            run.engine.dismiss()
    return answer


def _compare(run: Run, answer: Completion | None) -> None:
    with run.clock("sync_check"):
        difference = sync_check.check(run, answer)
    run.last_sync.stats = replace(run.last_sync.stats, sync_difference=difference)
