"""Records of what a step has done and what it took; `types` defines the records that are trained on."""

from dataclasses import dataclass

from lens_megatron.types import Group, Sample, TrainingGroup


@dataclass(frozen=True, slots=True)
class MismatchSums:
    """Sums over tokens, in which p is the trainer's probability of a sampled token and q the engine's."""

    tokens: float = 0.0
    """The number of tokens."""
    engine: float = 0.0
    """The sum of q."""
    trainer: float = 0.0
    """The sum of p."""
    engine_squared: float = 0.0
    """The sum of q squared."""
    trainer_squared: float = 0.0
    """The sum of p squared."""
    product: float = 0.0
    """The sum of p q."""
    difference: float = 0.0
    """The sum of |p - q|."""
    difference_squared: float = 0.0
    """The sum of (p - q) squared."""
    log_ratio: float = 0.0
    """The sum of log q - log p, in nats."""
    k3: float = 0.0
    """The sum of p/q - 1 - log(p/q), in nats."""
    weights: float = 0.0
    """The sum of the weights that the correction gave."""
    limited: float = 0.0
    """The number of tokens whose weight was truncated or which were dropped."""
    largest: float = 0.0
    """The maximum of |p - q|, which is no sum."""


@dataclass(frozen=True, slots=True)
class RescuedRatios:
    """What the original prompt x leaves of the rescued responses of one optimizer step, of all ranks.

    rho_t = pi(y_t | x) / pi_old(y_t | x') at a token, x' being the purified prompt, whatever ratio the loss uses. Every
    rho here is within exp(+-20), the bounds of all ratios.
    """

    least: tuple[float, ...] = ()
    """The least rho of each response, ascending."""
    products: tuple[float, ...] = ()
    """The product of rho over each response, ascending."""
    gradient: float = 0.0
    """The sum over tokens of |derivative of the weighted policy loss by the token's log-probability|."""
    on_policy_gradient: float = 0.0
    """What `gradient` would be with every ratio at 1."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Statistics of the response tokens of one optimizer step over all ranks, and the values the optimizer reported."""

    loss: float
    policy_loss: float
    kl: float
    """The mean over tokens of the k3 estimate of the divergence from the reference, in nats."""
    entropy: float
    """The mean entropy of the policy at a token, in nats."""
    ppo_kl: float
    """The mean of the old less the new log-probability over native tokens, in nats."""
    clip_fraction: float
    """The share of tokens at which a clip is active."""
    clip_fraction_rescued: float
    """The share of rescued tokens at which a clip is active."""
    abs_log_ratio_rescued: float
    """The mean of |log ratio| over rescued tokens, in nats."""
    ratio_min: float
    ratio_max: float
    """The maximum of the ratio over native tokens, of which `ratio_min` is the minimum."""
    grad_norm: float
    learning_rate: float
    skipped: bool
    """True when loss or gradient were not finite, so that no update was made."""
    mismatch_native: MismatchSums = MismatchSums()
    mismatch_rescued: MismatchSums = MismatchSums()
    """The sums over rescued tokens. The trainer's probabilities are under the purified prompt, as are the engine's;
    tokens of which the trainer computes none, as with `algorithm.rescued_ratio=original_prompt`, are left out."""
    rescued: RescuedRatios = RescuedRatios()


@dataclass(frozen=True, slots=True)
class Packing:
    """Describes how the samples of one optimizer step were divided among ranks and packed."""

    rows: int
    """The number of rows of this data-parallel rank's micro-batches, padding included."""
    padding: int
    """The number of these rows that hold no token of a sample."""
    imbalance: float
    """The cost of the costliest data-parallel rank divided by the mean cost; it is the same on every rank."""


@dataclass(frozen=True, slots=True)
class SyncStats:
    """The cost of one transfer of the policy's weights to this rank's engine."""

    tensors: int
    bytes: int
    """The size of the engine's tensors, each counted once and whole."""
    seconds: float
    received_bytes: int = 0
    """The number of bytes that this rank received from other ranks."""
    sync_difference: float = 0.0
    """The difference in nats between engines and trainer afterwards, see `phases.sync_check`; equal on every rank."""

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of weights loaded per second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class SamplingStats:
    """The cost of one call of `RolloutScheduler.sample` on one engine."""

    seconds: float = 0.0
    """The time from the call to its return."""
    engine_seconds: float = 0.0
    """Seconds of these that were spent inside the engine's steps."""
    second_wave_seconds: float = 0.0
    """The time from the end of the last first-wave rollout to the end of the last second-wave rollout; 0 when the
    second wave ended before the first."""
    early_decisions: int = 0
    """The number of groups that were found hard before the end of their first wave."""
    discarded_tokens: int = 0
    """The number of tokens that were generated for second waves that were then cancelled."""
    regraded: int = 0
    """The number of answers that were graded a second time because their grading process was lost."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate of a step that was sampled, for methods of selection and for metrics."""

    place: int
    """The place among the candidates of the step."""
    prompt_index: int
    """The row of the dataset."""
    kept: bool
    """Whether the step trains on its group."""
    success_rate: float
    """The share of correct rollouts of the first wave."""
    trained_success_rate: float
    """The share of correct rollouts of the training group, into which the second wave was merged."""
    native_tokens: int
    """Response tokens of the first wave."""
    rescue_tokens: int
    """Response tokens of the second wave."""


@dataclass(frozen=True, slots=True)
class CollectedGroups:
    """The groups of a step on one rank, and the cost of collecting them."""

    groups: list[Group]
    """The groups in the order of their prompts: while they are sampled those that the step rejects too."""
    stats: SamplingStats = SamplingStats()
    sync: SyncStats | None = None
    """The last transfer of weights while they were collected; None if the engine had the weights already."""
    rejected: tuple[TrainingGroup, ...] = ()
    """The groups that this data-parallel rank sampled and on which the step does not train; empty before."""
    outcomes: tuple[Outcome, ...] = ()
    """What became of the step's candidates that were sampled, those of all ranks, by place; empty before."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step on this data-parallel rank; the statistics of updates are those of all ranks."""

    step: int
    groups: tuple[TrainingGroup, ...]
    samples: tuple[Sample, ...]
    """The rollouts of `groups` in their order, with advantage and weight."""
    updates: tuple[UpdateStats, ...]
    """The statistics of each optimizer step; empty with `debug.rollout_only`, or if there was nothing to train on."""
    packings: tuple[Packing, ...]
    """The packing of each optimizer step. It describes the samples that this rank trained on, which may be others than
    those of `groups`, which it sampled."""
    sync: SyncStats | None
    """The last transfer of weights to the engine within this step. None if the step needed none, because rollouts were
    loaded, an evaluation had transferred these weights before, or no update was made since the last transfer."""
    sampling: SamplingStats
    weight_version: int
    """The version of the policy before the updates."""
    rejected: tuple[TrainingGroup, ...] = ()
    """The groups that this data-parallel rank sampled and that the selection rejected."""
    outcomes: tuple[Outcome, ...] = ()
    """What became of the step's candidates that were sampled, those of all ranks, by place."""
