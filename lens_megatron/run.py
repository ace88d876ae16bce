"""Holds everything of one rank of a run. `build.build_run` makes it; `step`, `evaluate` and `train` use it."""

from dataclasses import dataclass

from lens_megatron.algorithms.methods import Methods
from lens_megatron.algorithms.selection import Selection
from lens_megatron.config import Config
from lens_megatron.data.prompts import PromptStream
from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.evaluation.plan import EvalPlan
from lens_megatron.output.run_lease import RunLease
from lens_megatron.policy.model import Policy
from lens_megatron.policy.offload import TrainerMemory
from lens_megatron.policy.parallel import Mesh
from lens_megatron.reward import GraderPool
from lens_megatron.rollout.background import BackgroundSampling
from lens_megatron.rollout.engine import RolloutEngine
from lens_megatron.rollout.scheduler import RolloutScheduler
from lens_megatron.rollout.unfinished import UnfinishedGroups
from lens_megatron.rollout.vllm.tensor_parallel import EngineGroup
from lens_megatron.supervision.clock import Clock
from lens_megatron.supervision.control_store import ControlStore


@dataclass(frozen=True, slots=True)
class Run:
    """Holds everything that one rank of a run needs from its beginning to its end."""

    config: Config
    methods: Methods
    """The methods that the configuration names, loaded."""
    mesh: Mesh
    control: ControlStore
    """The store through which ranks exchange what no collective carries."""
    policy: Policy
    tokenizer: Tokenizer
    prompts: PromptStream
    selection: Selection
    """Decides which prompts a step samples; its state is equal on every rank."""
    eval_plan: EvalPlan
    engine: RolloutEngine
    engine_group: EngineGroup
    """The ranks that hold the engine together with this one."""
    graders: GraderPool
    scheduler: RolloutScheduler
    unfinished: UnfinishedGroups
    """The graded groups of the steps in progress, on disk; `scheduler` reads and writes them."""
    background: BackgroundSampling | None
    """The sampling of the next step while this one trains; None if each step is sampled before it trains."""
    trainer_memory: TrainerMemory
    lease: RunLease | None
    """The right to write to the run's folder, which only the main rank has."""
    clock: Clock

    @property
    def is_main(self) -> bool:
        """True on the rank that writes metrics and prints messages to the user."""
        return self.mesh.rank == 0

    def places(self, count: int) -> range:
        """Returns the places of this data-parallel rank among `count` candidates, groups or prompts of a step."""
        return range(self.mesh.dp_rank, count, self.mesh.dp_size)

    def is_over(self, step: int) -> bool:
        """Returns whether training ends after `step`, whose outcomes the selection has observed."""
        return self.config.train.ends(step, self.selection.epoch())

    def abandon(self) -> None:
        """Releases what would outlive the process, before a thread other than the main one ends it.

        Servers end by themselves.
        """
        try:
            self.graders.close()
        finally:
            if self.lease:
                self.lease.release()

    def close(self) -> None:
        """Ends the engine, the graders and the control store, and releases the run's folder."""
        try:
            self.engine.close()
            self.graders.close()
        finally:
            self.control.close()
            if self.lease:
                self.lease.release()
