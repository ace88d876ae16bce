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
    """The original prompt."""
    PURIFIED = "purified"
    """The purified prompt (second wave)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One rendered row of a dataset.

    Example: Prompt(index=7, token_ids=(1, 40, 41, 2), eligible=(False, True, True, False), answer="12",
    problem="5 + 7 = ?", source="train.jsonl").
    """

    index: int
    """Row of the dataset: the identity of the prompt in every log."""
    token_ids: tuple[int, ...]
    """[L] the prompt as the model reads it, chat template included."""
    eligible: tuple[bool, ...]
    """[L] True where purification may delete the token."""
    answer: str
    problem: str
    """The user's text, without template and instruction."""
    source: str
    """Name of the data source, used in metric names."""


@dataclass(frozen=True, slots=True)
class PurifiedPrompt:
    """A prompt with its most interfering tokens deleted, and why."""

    token_ids: tuple[int, ...]
    """[L - k] what is left, in order."""
    deleted: tuple[int, ...]
    """[k] positions in the original prompt, ascending."""
    scores: tuple[float, ...]
    """[L] interference score of every token of the original prompt; 0 at position 0."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, graded."""

    token_ids: tuple[int, ...]
    """[L] generated tokens, end-of-sequence included when it was generated."""
    log_probs: tuple[float, ...]
    """[L] the engine's log-probabilities of the sampled tokens under the prompt it saw (temperature applied)."""
    finished: bool
    """True when the model stopped by itself, False when it ran into `max_response_length`."""
    origin: Origin
    weight_version: int
    """Version of the policy weights that sampled it."""
    reward: float
    status: GradeStatus

    @property
    def correct(self) -> bool:
        return self.status is GradeStatus.CORRECT


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its rollouts: the first wave and, for a hard prompt, the second."""

    prompt: Prompt
    native: tuple[Rollout, ...]
    """[G] first wave."""
    purified: PurifiedPrompt | None = None
    """The purified prompt, whether or not a second wave was needed. None: nothing to delete."""
    rescue: tuple[Rollout, ...] = ()
    """[G] second wave, from the purified prompt; empty when the prompt was not hard."""

    @property
    def success_rate(self) -> float:
        """Share of correct rollouts of the first wave; the a of the LENS paper, eq. 4."""
        return sum(r.correct for r in self.native) / len(self.native)


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """The group CRPO trains on: first wave, with failures replaced by rescued successes where the gate opened."""

    group: Group
    rollouts: tuple[Rollout, ...]
    gate: bool
    """True when the second wave did better and its successes came in."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on. `rollout` was sampled from `generation_prompt`, and is trained under `prompt`."""

    prompt: tuple[int, ...]
    generation_prompt: tuple[int, ...]
    rollout: Rollout
    advantage: float
    weight: float
    """w~ of the LENS paper, eq. 4, as it multiplies the loss; 1 for GRPO."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """Denominators of the loss, global over data-parallel ranks and known before the update begins."""

    response_tokens: int
    sequences: int
    rescued_sequences: int


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How a rank's part of a packed batch is cut out of it."""

    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    sequence_parallel_size: int = 1
    """Ranks that divide the packed rows among them; 1 without sequence parallelism."""

    @property
    def alignment(self) -> int:
        """Each sequence is padded to a multiple of this: 2 chunks per context-parallel rank, else nothing."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Sequences laid end to end, prompt followed by response, and those of their T response tokens asked about.

    Under context parallelism a rank holds some of the S rows and asks about t of the T tokens; else t = T.
    """

    input_ids: Tensor
    """[1, S] int64; padding is token 0, at the end of sequences, where no causal row looks."""
    position_ids: Tensor
    """[1, S] int64, from 0 in each sequence."""
    bounds: tuple[int, ...]
    """[B + 1] where the padded sequences begin, before they are cut for context parallelism, and the end."""
    target_ids: Tensor
    """[t] int64, the response tokens, sequence after sequence: the only ones whose log-probability is computed."""
    positions: Tensor
    """[t] int64, the row whose hidden state predicts each of them."""
    own: Tensor | None
    """[t] int64 under context parallelism: which of the T response tokens they are. None: all."""
    lengths: tuple[int, ...]
    """[B] how many of the T belong to each sequence."""


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss of a micro-batch's T response tokens is made of, beside their log-probabilities. All [T].

    float32 where nothing else is said; in the order of the micro-batch's `target_ids`.
    """

    advantages: Tensor
    policy_weights: Tensor
    """w~ / denominator: the sum over all micro-batches of all ranks is the loss."""
    kl_weights: Tensor
    entropy_weights: Tensor
    imitation_weights: Tensor
    old_log_probs: Tensor
    """NaN: on-policy, the ratio is 1 and the old log-probability is the current one, detached."""
    reference_log_probs: Tensor
    rescued: Tensor
    """bool: tokens sampled from the purified prompt."""
    engine_log_probs: Tensor
    """What the engine reported, under the prompt that generated the response."""
    trainer_log_probs: Tensor
    """The trainer's beside it. NaN: on-policy, the current log-probability, as for `old_log_probs`."""
    corrections: Tensor
    """Weights of `algorithm.correction`; `policy_weights` hold them already."""
    limited: Tensor
    """bool: truncated or dropped by the correction."""
    first: Tensor
    """int64, which of the T is the first token of the same response: equal for the tokens of one response."""

    def at(self, part: slice | Tensor) -> "TokenTerms":
        return TokenTerms(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward-backward pass needs."""

    sequences: SequenceBatch
    terms: TokenTerms

    @property
    def own_terms(self) -> TokenTerms:
        """Of the t tokens that this context-parallel rank asks about."""
        return self.terms if self.sequences.own is None else self.terms.at(self.sequences.own)


@dataclass(frozen=True, slots=True)
class MismatchSums:
    """Sums over tokens; p is the trainer's probability of a sampled token and q the engine's."""

    tokens: float = 0.0
    engine: float = 0.0
    """Of q."""
    trainer: float = 0.0
    """Of p."""
    engine_squared: float = 0.0
    trainer_squared: float = 0.0
    product: float = 0.0
    """Of p q."""
    difference: float = 0.0
    """Of |p - q|."""
    difference_squared: float = 0.0
    log_ratio: float = 0.0
    """Of log q - log p."""
    k3: float = 0.0
    weights: float = 0.0
    """Of the correction."""
    limited: float = 0.0
    """Tokens whose weight was truncated or which were dropped."""
    largest: float = 0.0
    """Not a sum: the maximum of |p - q|."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Sums over the response tokens of one optimizer step, global over all ranks, and what the optimizer reported."""

    loss: float
    policy_loss: float
    kl: float
    """Mean k3 estimate against the reference."""
    entropy: float
    ppo_kl: float
    """Mean of old - new log-probability over native tokens."""
    clip_fraction: float
    clip_fraction_rescued: float
    abs_log_ratio_rescued: float
    ratio_min: float
    ratio_max: float
    """Extremes of the ratio over native tokens."""
    grad_norm: float
    learning_rate: float
    skipped: bool
    """True when loss or gradient were not finite and no update was made."""
    mismatch_native: MismatchSums = MismatchSums()
    mismatch_rescued: MismatchSums = MismatchSums()
    """Trainer's log-probabilities under the purified prompt, which the engine saw."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How the samples of one optimizer step were dealt out and packed."""

    rows: int
    """Rows of this data-parallel rank's micro-batches, padding included."""
    padding: int
    """Those of them that hold no token of a sample."""
    imbalance: float
    """Cost of the costliest data-parallel rank / mean; the same on every rank."""


@dataclass(frozen=True, slots=True)
class SyncStats:
    """What one transfer of weights to this rank's engine took."""

    tensors: int
    bytes: int
    """Of the engine's tensors, each once and whole."""
    seconds: float
    received_bytes: int = 0
    """What came to this rank from others."""
    sync_difference: float = 0.0
    """Nats between engines and trainer afterwards, see `phases.sync_check`; the same on every rank."""

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of weights loaded per second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class SamplingStats:
    """One call of `RolloutScheduler.sample` on one engine."""

    seconds: float = 0.0
    """From its beginning to its end."""
    engine_seconds: float = 0.0
    """Of these, inside the engine's steps."""
    second_wave_seconds: float = 0.0
    """From the end of the last first-wave rollout to that of the last second-wave one; 0 when that was before."""
    early_decisions: int = 0
    """Groups found hard before the end of their first wave."""
    discarded_tokens: int = 0
    """Generated for second waves that were taken back."""
    regraded: int = 0
    """Answers that were graded a second time because their grading process was lost."""


@dataclass(frozen=True, slots=True)
class CollectedGroups:
    """The groups of a step on one rank."""

    groups: list[Group]
    stats: SamplingStats = SamplingStats()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made on this data-parallel rank; statistics of updates are global."""

    step: int
    groups: tuple[TrainingGroup, ...]
    samples: tuple[Sample, ...]
    """The rollouts of `groups` in order, with advantage and weight."""
    updates: tuple[UpdateStats, ...]
    """One per optimizer step; empty with `debug.rollout_only`."""
    packings: tuple[Packing, ...]
    """One per optimizer step, of the samples that this rank trained on: not those of `groups`, which it sampled."""
    sync: SyncStats
    """The last transfer before the step's end."""
    sampling: SamplingStats
    weight_version: int
    """Of the policy before the updates."""
