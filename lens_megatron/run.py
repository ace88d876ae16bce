"""Everything one rank of a run holds. Built by `build.build_run`, used by `step`, `evaluate` and `train`."""

from dataclasses import dataclass

from lens_megatron.config import Config
from lens_megatron.data.prompts import PromptStream
from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.output.run_lease import RunLease
from lens_megatron.policy.model import Policy
from lens_megatron.policy.offload import TrainerMemory
from lens_megatron.policy.parallel import Mesh
from lens_megatron.reward import GraderPool
from lens_megatron.rollout.background import BackgroundSampling
from lens_megatron.rollout.engine import RolloutEngine
from lens_megatron.rollout.scheduler import RolloutScheduler
from lens_megatron.rollout.vllm.tensor_parallel import EngineGroup
from lens_megatron.supervision.clock import Clock
from lens_megatron.supervision.control_store import ControlStore
from lens_megatron.types import Prompt, SyncStats


@dataclass(slots=True)
class LastSync:
    """The last transfer of a run."""

    stats: SyncStats = SyncStats(0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class Run:
    config: Config
    mesh: Mesh
    control: ControlStore
    """What the ranks tell each other beside collectives."""
    policy: Policy
    tokenizer: Tokenizer
    prompts: PromptStream
    eval_prompts: tuple[Prompt, ...]
    engine: RolloutEngine
    engine_group: EngineGroup
    """The ranks that hold the engine together."""
    graders: GraderPool
    sampler: RolloutScheduler
    background: BackgroundSampling | None
    """Given: the next step is sampled while this one trains."""
    trainer_memory: TrainerMemory
    last_sync: LastSync
    lease: RunLease | None
    """The right to write to the run's folder; on the main rank."""
    clock: Clock

    @property
    def is_main(self) -> bool:
        """The rank that writes metrics and talks to the user."""
        return self.mesh.rank == 0

    def abandon(self) -> None:
        """Before another thread than the main one ends the process. Servers end by themselves."""
        try:
            self.graders.close()
        finally:
            if self.lease:
                self.lease.release()

    def close(self) -> None:
        try:
            self.engine.close()
            self.graders.close()
        finally:
            self.control.close()
            if self.lease:
                self.lease.release()
