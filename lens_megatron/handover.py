"""Whose the device is: the trainer's, but for the phases in which the engine samples.

    weights to the engine -> trainer's state to the host -> engine awake -> sampling -> engine asleep -> trainer back
                                                                         (or following)

Weights come first because they are read from the trainer. Whatever need not move (embedded engine, CPU, servers, or as
configured) stays, and costs nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lens_megatron import weight_sync
from lens_megatron.policy.hf_weights import export_weights
from lens_megatron.rollout.team import TeamEngine
from lens_megatron.run import Run
from lens_megatron.types import SyncStats


def push_weights(run: Run) -> SyncStats:
    """Gives the engine the policy's weights, which must be on the device. A collective."""
    with run.clock("update_weights"):
        return weight_sync.push(export_weights(run.policy.bridge, run.policy.chunks), run.engine, run.policy.version)


@contextmanager
def engine_awake(run: Run) -> Iterator[None]:
    """Within the block the engine can sample from the policy, and the policy cannot be used. A collective.

    Of an engine over several ranks the first samples within the block; the others enter it when that is done, and must
    find nothing to do there: a collective of both would hang. An error within the block leaves the device as it is.
    """
    if run.engine.version != run.policy.version:  # given up when it slept, after an evaluation
        push_weights(run)
    with run.clock("wake"):
        run.trainer_memory.to_host()
        run.engine.wake()
    # As many phases on the rank that leads as on those that follow, or the watchdog would take some to be late.
    if isinstance(run.engine, TeamEngine) and not run.team.leads:
        with run.clock("gen"):
            run.engine.follow()
    yield
    if isinstance(run.engine, TeamEngine) and run.team.leads:
        with run.clock("gen"):
            run.engine.dismiss()
    with run.clock("sleep"):
        run.engine.sleep()
        run.trainer_memory.to_device()
