"""Records that cross modules, in the order in which a training step makes them.

Axes, everywhere in the project:
    P  prompts of a step            G  rollouts per prompt          N  samples (sequences) of a step
    L  tokens of one sequence       B  sequences of a micro-batch   S  rows of a micro-batch, packed
    T  rows given to a kernel       V  vocabulary (or this rank's shard)                D  hidden size

Sequences of token ids are plain tuples until `pack` makes tensors of them.
"""

from dataclasses import dataclass, fields
from enum import StrEnum

from torch import Tensor

from lens_megatron.reward.types import GradeStatus


class Origin(StrEnum):
    """Which prompt a rollout was sampled from."""

    NATIVE = "native"
    """The prompt of the dataset: every rollout of the first wave."""
    PURIFIED = "purified"
    """The purified prompt: every rollout of the second wave, failures too. Those of them that are trained on came in
    through the gate (`algorithms.rescue`), and only they are called rescued."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One rendered row of a dataset.

    Example: Prompt(index=7, token_ids=(1, 40, 41, 2), eligible=(False, True, True, False), answer="12",
    problem="5 + 7 = ?", source="train.jsonl").
    """

    index: int
    """The row of the dataset, by which every log names the prompt."""
    token_ids: tuple[int, ...]
    """[L] token ids of the prompt as the model reads it, chat template included."""
    eligible: tuple[bool, ...]
    """[L] True where purification may delete the token."""
    answer: str
    """The reference answer, which the grader compares a completion with."""
    problem: str
    """The user's text, without template and instruction."""
    source: str
    """Name of the data source; metric names contain it."""


@dataclass(frozen=True, slots=True)
class PurifiedPrompt:
    """A prompt with its most interfering tokens deleted, and why."""

    token_ids: tuple[int, ...]
    """[L - k] token ids that are left, in their order."""
    deleted: tuple[int, ...]
    """[k] positions of the deleted tokens in the original prompt, ascending."""
    scores: tuple[float, ...]
    """[L] the interference score of every token of the original prompt, in nats; it is 0 at position 0."""


@dataclass(frozen=True, slots=True)
class StepPrompt:
    """A prompt of a step, ready to be sampled."""

    place: int
    """Its place among the prompts of the step, counted from 0 in data order over all ranks. Seeds are functions of the
    place: a prompt that stands twice in a step, which happens where two epochs meet, has two places and draws twice."""
    prompt: Prompt
    purified: PurifiedPrompt | None
    """What the second wave is sampled from; None where nothing is to be deleted, and there is no second wave then."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, graded."""

    token_ids: tuple[int, ...]
    """[L] ids of the generated tokens; the end-of-sequence token is one of them if it was generated."""
    log_probs: tuple[float, ...]
    """[L] the engine's log-probabilities of the sampled tokens, in nats, under the prompt that the engine saw and at
    the temperature it sampled with."""
    finished: bool
    """True when the model stopped by itself, False when it ran into `max_response_length`."""
    origin: Origin
    weight_version: int
    """The version of the policy's weights that sampled it: the number of updates made before."""
    reward: float
    """The grader's score."""
    status: GradeStatus

    @property
    def correct(self) -> bool:
        return self.status is GradeStatus.CORRECT


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its rollouts: those of the first wave and, if the prompt was hard, those of the second."""

    prompt: Prompt
    native: tuple[Rollout, ...]
    """[G] rollouts of the first wave, sampled from the prompt."""
    purified: PurifiedPrompt | None = None
    """The purified prompt, whether or not a second wave was needed; None where nothing was to be deleted."""
    rescue: tuple[Rollout, ...] = ()
    """[G] rollouts of the second wave, sampled from the purified prompt; empty when the prompt was not hard."""

    @property
    def success_rate(self) -> float:
        """Share of correct rollouts of the first wave; the a of the LENS paper, eq. 4."""
        return sum(r.correct for r in self.native) / len(self.native)


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """What CRPO trains on: the first wave, in which rescued successes replace failures where the gate opened."""

    group: Group
    rollouts: tuple[Rollout, ...]
    """Native rollouts come first, rescued ones after them."""
    gate: bool
    """True when the second wave did better than the first, so that its successes came in."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on. `rollout` was sampled from `generation_prompt`, and is trained under `prompt`."""

    prompt: tuple[int, ...]
    """Token ids of the original prompt."""
    generation_prompt: tuple[int, ...]
    """Token ids of the prompt that the engine saw: the purified one for a rescued rollout, else the original one."""
    rollout: Rollout
    advantage: float
    weight: float
    """w~ of the LENS paper, eq. 4, as it multiplies the loss; 1 for GRPO."""


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A sample with what the trainer's own forward passes say of the L tokens of its response, in nats."""

    sample: Sample
    old_log_probs: Tensor | None
    """[L] float32, log pi_old under the prompt that generated the response. None marks the row as on-policy: its ratio
    is 1 exactly, which the difference of two passes over the same weights is only nearly."""
    trainer_log_probs: Tensor | None
    """[L] float32, the trainer's log-probabilities before the update, under the prompt that generated the response: the
    engine's are compared with these and corrected to them. None where the update's own pass serves as well."""
    reference_log_probs: Tensor | None
    """[L] float32, log pi_ref under the original prompt; None without a KL term."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """What the loss is divided by: counts over all data-parallel ranks, which are known before the update begins."""

    response_tokens: int
    sequences: int
    rescued_sequences: int


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How a rank's part of a packed batch is cut out of it."""

    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    sequence_parallel_size: int = 1
    """The number of ranks that divide the packed rows among them; 1 without sequence parallelism."""

    @property
    def alignment(self) -> int:
        """Sequences are padded to a multiple of this many tokens, so that context-parallel ranks get 2 chunks each."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Sequences laid end to end, each a prompt followed by its response; the T response tokens are asked about.

    Under context parallelism a rank holds some of the S rows and asks about t of the T tokens; otherwise t = T.
    """

    input_ids: Tensor
    """[1, S] int64. Sequences are padded with token 0 at their ends, where no row looks under a causal mask."""
    position_ids: Tensor
    """[1, S] int64, counted from 0 in each sequence."""
    bounds: tuple[int, ...]
    """[B + 1] rows at which the padded sequences begin, and the end, before they are cut for context parallelism."""
    target_ids: Tensor
    """[t] int64, ids of the response tokens, sequence after sequence: only their log-probabilities are computed."""
    positions: Tensor
    """[t] int64, the row whose hidden state predicts each of these tokens."""
    own: Tensor | None
    """[t] int64 under context parallelism, which of the T response tokens these are; None where they are all."""
    lengths: tuple[int, ...]
    """[B] how many of the T response tokens belong to each sequence."""


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss of a micro-batch's T response tokens is made of, beside their current log-probabilities.

    Every field is [T], in the order of the micro-batch's `target_ids` before any cut for context parallelism, and
    float32 where nothing else is said. Log-probabilities are in nats.
    """

    advantages: Tensor
    policy_weights: Tensor
    """What multiplies the policy's loss of a token: w~ and the correction, divided by the loss's denominator. So the
    sum over all micro-batches of all ranks is the loss."""
    kl_weights: Tensor
    entropy_weights: Tensor
    imitation_weights: Tensor
    old_log_probs: Tensor
    """log pi_old. NaN marks an on-policy token: the current log-probability, detached, stands in, the ratio is 1."""
    reference_log_probs: Tensor
    rescued: Tensor
    """bool, True for tokens that were sampled from the purified prompt."""
    engine_log_probs: Tensor
    """What the engine reported, under the prompt that generated the response."""
    trainer_log_probs: Tensor
    """What the trainer says of the same tokens under the same prompt. NaN: the current log-probability stands in."""
    corrections: Tensor
    """Weights of `algorithm.correction`; `policy_weights` contain them already."""
    limited: Tensor
    """bool, True for tokens whose weight was truncated or which were dropped by the correction."""
    first: Tensor
    """int64, the number among the T of the first token of the same response; equal for all tokens of one response."""

    def at(self, part: slice | Tensor) -> "TokenTerms":
        return TokenTerms(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass needs."""

    sequences: SequenceBatch
    terms: TokenTerms

    @property
    def own_terms(self) -> TokenTerms:
        """The terms of the t tokens that this context-parallel rank asks about."""
        return self.terms if self.sequences.own is None else self.terms.at(self.sequences.own)


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
class UpdateStats:
    """Statistics of the response tokens of one optimizer step over all ranks, and what the optimizer reported."""

    loss: float
    policy_loss: float
    kl: float
    """The mean over tokens of the k3 estimate of the divergence from the reference, in nats."""
    entropy: float
    """The mean entropy of the policy at a token, in nats."""
    ppo_kl: float
    """The mean of the old less the new log-probability over native tokens, in nats."""
    clip_fraction: float
    """The share of tokens at which a clip holds."""
    clip_fraction_rescued: float
    """The share of rescued tokens at which a clip holds."""
    abs_log_ratio_rescued: float
    """The mean of |log ratio| over rescued tokens, in nats."""
    ratio_min: float
    ratio_max: float
    """`ratio_min` and this are the extremes of the ratio over native tokens."""
    grad_norm: float
    learning_rate: float
    skipped: bool
    """True when loss or gradient were not finite, so that no update was made."""
    mismatch_native: MismatchSums = MismatchSums()
    mismatch_rescued: MismatchSums = MismatchSums()
    """The trainer's log-probabilities in it are those under the purified prompt, which the engine saw."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How the samples of one optimizer step were divided among ranks and packed."""

    rows: int
    """The rows of this data-parallel rank's micro-batches, padding included."""
    padding: int
    """Those of the rows that hold no token of a sample."""
    imbalance: float
    """The cost of the costliest data-parallel rank divided by the mean cost; it is the same on every rank."""


@dataclass(frozen=True, slots=True)
class SyncStats:
    """What one transfer of the policy's weights to this rank's engine took."""

    tensors: int
    bytes: int
    """The size of the engine's tensors, each counted once and whole."""
    seconds: float
    received_bytes: int = 0
    """What came to this rank from other ranks."""
    sync_difference: float = 0.0
    """By how many nats engines and trainer differed afterwards, see `phases.sync_check`; the same on every rank."""

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of weights loaded per second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class SamplingStats:
    """What one call of `RolloutScheduler.sample` took on one engine."""

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
class CollectedGroups:
    """The groups of a step on one rank, and what it took to collect them."""

    groups: list[Group]
    """They stand in the order of their prompts."""
    stats: SamplingStats = SamplingStats()
    sync: SyncStats | None = None
    """The last transfer of weights while they were collected; None if the engine had the weights already."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made on this data-parallel rank; the statistics of updates are those of all ranks."""

    step: int
    groups: tuple[TrainingGroup, ...]
    samples: tuple[Sample, ...]
    """The rollouts of `groups` in their order, with advantage and weight."""
    updates: tuple[UpdateStats, ...]
    """One entry per optimizer step; empty with `debug.rollout_only`."""
    packings: tuple[Packing, ...]
    """One entry per optimizer step. It is of the samples that this rank trained on, which may be other ones than those
    of `groups`, which it sampled."""
    sync: SyncStats | None
    """The last transfer of weights to the engine within this step. None: the step needed none, because rollouts were
    loaded, an evaluation had transferred these weights before, or no update was made since the last transfer."""
    sampling: SamplingStats
    weight_version: int
    """The version of the policy before the updates."""
