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
    """Names the prompt that a rollout was sampled from."""

    NATIVE = "native"
    """The prompt of the dataset: every rollout of the first wave."""
    PURIFIED = "purified"
    """The purified prompt: every rollout of the second wave, failures too. Those that the gate (`algorithms.rescue`)
    admits are trained on, and only they are called rescued."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: one rendered row of a dataset.

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
    noise: tuple[bool, ...] = ()
    """[L] True where the data marks the token as noise (`data.noise_key`); empty without such marks."""
    record: str = ""
    """The row of the dataset as `reward.rows.encode` writes it; empty unless a grader or a rule needs it."""


@dataclass(frozen=True, slots=True)
class PurifiedPrompt:
    """A prompt as it is sampled a second time, without the tokens that the purifier deleted."""

    token_ids: tuple[int, ...]
    """[L - k] token ids that are left, in their order; those of the prompt itself where k is 0."""
    deleted: tuple[int, ...]
    """[k] positions of the deleted tokens in the original prompt, ascending."""
    scores: tuple[float, ...]
    """[L] the number of every token of the original prompt by which the purifier decided. interference: its score in
    nats, of the kind that its options name. gradient: the norm of its gradient, of which the smallest decide. random:
    its draw from [0, 1). oracle: 1 if the data marks it as noise, else 0. resampling: 0."""


@dataclass(frozen=True, slots=True)
class StepPrompt:
    """A prompt of a step, ready to be sampled."""

    place: int
    """The place among the candidates of the step, counted from 0 in data order over all ranks. Seeds are functions of
    the place: a prompt that occurs twice in a step, as can happen where two epochs meet, has two places and draws
    twice."""
    prompt: Prompt
    purified: PurifiedPrompt | None
    """The prompt that the second wave is sampled from; None, without a second wave, where the purifier wants none."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled and graded completion."""

    token_ids: tuple[int, ...]
    """[L] ids of the generated tokens; the end-of-sequence token is one of them if it was generated."""
    log_probs: tuple[float, ...]
    """[L] the engine's log-probabilities of the sampled tokens, in nats, under the prompt that the engine saw and at
    the temperature it sampled with."""
    finished: bool
    """True when the model stopped by itself, False when it ran into `max_response_length`."""
    origin: Origin
    weight_version: int
    """The version of the policy's weights that sampled the completion: the number of updates made before."""
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
    """The purified prompt, whether or not a second wave was needed; None where the purifier wanted no second wave."""
    rescue: tuple[Rollout, ...] = ()
    """[G] rollouts of the second wave, sampled from the purified prompt; empty when the prompt was not hard."""
    place: int = 0
    """The place of its prompt among the candidates of the step; see `StepPrompt.place`."""

    @property
    def success_rate(self) -> float:
        """Share of correct rollouts of the first wave; the a of the LENS paper, eq. 4."""
        return sum(r.correct for r in self.native) / len(self.native)


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """The rollouts that CRPO trains on: the first wave, where rescued successes replace failures if the gate opened."""

    group: Group
    rollouts: tuple[Rollout, ...]
    """Native rollouts come first, rescued ones after them."""
    gate: bool
    """True when the second wave had more success than the first, so that its successes are trained on."""


@dataclass(frozen=True, slots=True)
class GroupNumbers:
    """The numbers of a training group that methods which look at the whole step may see, one per rollout."""

    place: int
    rewards: tuple[float, ...]
    lengths: tuple[int, ...]
    """Response tokens."""
    correct: tuple[bool, ...]

    @classmethod
    def of(cls, group: TrainingGroup) -> "GroupNumbers":
        rollouts = group.rollouts
        return cls(
            group.group.place,
            tuple(r.reward for r in rollouts),
            tuple(len(r.token_ids) for r in rollouts),
            tuple(r.correct for r in rollouts),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence to train on. `rollout` was sampled from `generation_prompt`, and is trained under `prompt`."""

    prompt: tuple[int, ...]
    """Token ids of the original prompt."""
    generation_prompt: tuple[int, ...]
    """Token ids of the prompt that the engine saw: the purified one for a rescued rollout, else the original one."""
    rollout: Rollout
    advantage: float
    weight: float
    """What multiplies the loss: w~ of the LENS paper, eq. 4; 1 for GRPO."""
    keep: bool = True
    """False: it takes no part in the loss, nor in the denominators of the loss."""


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A sample with log-probabilities of the L tokens of its response, in nats, from the trainer's forward passes."""

    sample: Sample
    old_log_probs: Tensor | None
    """[L] float32, log pi_old under the prompt that generated the response, or the original one where
    `algorithm.rescued_ratio` says so. None marks the row as on-policy: its ratio is exactly 1, while two passes over
    the same weights would give only nearly 1."""
    trainer_log_probs: Tensor | None
    """[L] float32, the trainer's log-probabilities before the update, under the prompt that generated the response: the
    engine's are compared with these and corrected to them. None where the update's own pass serves as well, or where
    nothing needs them."""
    reference_log_probs: Tensor | None
    """[L] float32, log pi_ref under the original prompt; None without a KL term."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """Counts that the loss is divided by, over all data-parallel ranks; they are known before the update begins."""

    response_tokens: int
    sequences: int
    rescued_sequences: int


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Describes how a rank's part of a packed batch is cut out of it."""

    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    sequence_parallel_size: int = 1
    """The number of ranks that divide the packed rows among them; 1 without sequence parallelism."""
    shares_prompts: bool = False
    """Sequences that follow each other and have the same prompt share its rows; not under context parallelism."""

    @property
    def alignment(self) -> int:
        """Sequences are padded to a multiple of this many tokens, so that context-parallel ranks get 2 chunks each."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Sequences laid end to end, each a prompt and its response; the log-probabilities of T response tokens are needed.

    Under context parallelism a rank holds some of the S rows and computes t of the T tokens; otherwise t = T.
    """

    input_ids: Tensor
    """[1, S] int64. Sequences are padded with token 0 at their ends, which no row attends to under a causal mask."""
    position_ids: Tensor
    """[1, S] int64, counted from 0 in each sequence."""
    bounds: tuple[int, ...]
    """[B + 1] rows at which the padded sequences begin, and the end, before any cut for context parallelism. A sequence
    that shares the prompt of an earlier one has only the rows of its response."""
    target_ids: Tensor
    """[t] int64, ids of the response tokens, sequence after sequence: only their log-probabilities are computed."""
    positions: Tensor
    """[t] int64, the row whose hidden state predicts each of these tokens."""
    own: Tensor | None
    """[t] int64 under context parallelism, which of the T response tokens these are; None where they are all."""
    lengths: tuple[int, ...]
    """[B] the number of the T response tokens that belong to each sequence."""
    tokens: int
    """The rows that hold a token of a sequence, before any cut for context parallelism; the others are padding."""
    prefixes: tuple[tuple[int, int], ...] = ()
    """[B] the rows [first, last + 1) of the prompt that a sequence shares with an earlier one; (0, 0) for a sequence
    that has its prompt itself. Empty where none is shared."""


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """The inputs of the loss of a micro-batch's T response tokens, except their current log-probabilities.

    Every field is [T], in the order of the micro-batch's `target_ids` before any cut for context parallelism, and
    float32 unless another dtype is given. Log-probabilities are in nats.
    """

    advantages: Tensor
    policy_weights: Tensor
    """The factors of the policy's loss of a token: w~ and the correction, divided by the loss's denominator. So the
    sum over all micro-batches of all ranks is the loss."""
    kl_weights: Tensor
    entropy_weights: Tensor
    imitation_weights: Tensor
    old_log_probs: Tensor
    """The log pi_old. NaN marks an on-policy token: the detached current log-probability is used, so the ratio is 1."""
    reference_log_probs: Tensor
    rescued: Tensor
    """A bool that is True for tokens that were sampled from the purified prompt."""
    engine_log_probs: Tensor
    """The log-probabilities that the engine reported, under the prompt that generated the response."""
    trainer_log_probs: Tensor
    """The trainer's log-probabilities under the same prompt. Where one is NaN, the current log-probability is used, if
    that is under the same prompt."""
    corrections: Tensor
    """Weights of `algorithm.correction`; `policy_weights` contain them already."""
    limited: Tensor
    """A bool that is True for tokens whose weight the correction truncated or which it dropped."""
    first: Tensor
    """An int64: the index among the T of the first token of the same response, equal for all tokens of a response."""

    def at(self, part: slice | Tensor) -> "TokenTerms":
        return TokenTerms(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The inputs of one forward and backward pass."""

    sequences: SequenceBatch
    terms: TokenTerms

    @property
    def own_terms(self) -> TokenTerms:
        """Returns the terms of the t tokens that this context-parallel rank computes."""
        return self.terms if self.sequences.own is None else self.terms.at(self.sequences.own)
