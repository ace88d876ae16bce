"""Declares the options of methods: which prompts are taken, how they are purified and graded, and what is learnt.

Where an option names a method, `python -m lens_megatron.algorithms` lists the names with their own options, and a
method of the user's own is named as `module:attribute`.
"""

from typing import Any, Literal

from pydantic import Field

from lens_megatron.config.section import Section
from lens_megatron.reward.limits import MAX_TIMEOUT_S


class SelectionConfig(Section):
    """Says which prompts of the data a step samples, and which of their groups it trains on."""

    method: str = "every_prompt"
    """Names the method: every_prompt, dynamic_sampling (DAPO), greso, or your own as `module:attribute`."""
    options: dict[str, Any] = {}
    """The method's own options."""
    candidate_batches: int = Field(4, ge=1, le=100)
    """A method that rejects groups may sample at most this many times `rollout.prompts_per_step` prompts in a step. If
    fewer groups than that pass, the step trains on fewer."""


class RewardConfig(Section):
    """Says how completions are graded."""

    grader: str | tuple[str, ...] = "math_verify"
    """A registered grader, or your own as `module:function`, with verl's or TRL's signature; or a list of them, whose
    scores are added. The first one's verdict decides what is correct."""
    weights: tuple[float, ...] = ()
    """The factors of the graders' scores, one each. When empty: all 1."""
    success_threshold: float | None = None
    """A rollout with at least this reward counts as correct, any other as wrong; one whose grading failed never counts
    as correct. Evaluations compare the graders' scores with it, without `rules`. When empty: the verdict counts."""
    rules: dict[str, dict[str, Any]] = {}
    """Changes to the rewards of training rollouts, in this order, before it is decided which prompts are hard: names
    (flips, overlong, rpr, or your own as `module:attribute`) with their own options."""
    timeout_s: float = Field(5.0, ge=1e-3, le=MAX_TIMEOUT_S)
    """Seconds that the grading of one answer may take, from its start; the process is killed then. At most a day."""
    workers_per_rank: int = Field(1, ge=1, le=256)
    """Grading processes of every rank. A machine runs at most 16 for each of its cores, all ranks together."""

    @property
    def graders(self) -> tuple[str, ...]:
        """`grader` as a list."""
        return (self.grader,) if isinstance(self.grader, str) else self.grader

    @property
    def needs_rows(self) -> bool:
        """True where a grader or a rule may look at more of a row than the problem and the answer."""
        return self.graders != ("math_verify",) or bool(self.rules)


class LensConfig(Section):
    """Instruction purification. Defaults are the readings of the paper that this project takes."""

    enabled: bool = True
    """With false nothing is purified and each prompt is sampled once: the program is then a plain GRPO trainer."""
    purifier: str = "interference"
    """Says how the second prompt is made: interference, random, gradient, resampling, oracle, or your own as
    `module:attribute`."""
    purifier_options: dict[str, Any] = {}
    """The purifier's own options."""
    tau: float = Field(0.5, ge=0, le=1)
    """A prompt whose success rate is strictly below tau is hard. It is sampled again, purified."""
    deletion_ratio: float = Field(0.03, gt=0, lt=1)
    """The paper's gamma: the share of tokens to delete, rounded up to whole tokens."""
    eligible: Literal["problem", "user", "all_nonspecial", "all"] = "problem"
    """Tokens that may be deleted. problem: those of the problem's text. user: those of the user's turn, the instruction
    included. all_nonspecial: all but special tokens. all: every token."""
    protect_whitespace: bool = True
    """Never delete a token that is nothing but white space."""
    ratio_base: Literal["eligible", "full"] = "eligible"
    """Says what the deletion ratio is a share of: the tokens that may be deleted, or all tokens of the prompt."""
    deletion: Literal["ids", "text"] = "ids"
    """Says how tokens are deleted. ids: delete token ids. text: delete their text, and tokenize what remains again."""
    min_score: float = Field(1e-4, ge=0)
    """The noise floor of interference, in nats: a prompt whose highest score is below it is not purified."""
    tie_break: Literal["position", "random"] = "position"
    """Says which of several tokens with the same score is deleted: the first one, or a random one."""
    gate: Literal["strict", "always"] = "strict"
    """Says when the second wave counts. strict: only with a higher success rate than the first's. always: in any
    case."""
    cap_rescued: bool = False
    """Add at most as many successes as failures were removed, so that the group keeps its size."""
    min_keep_failures: int = Field(0, ge=0)
    """Failures of the first wave that always stay in the group."""


class AlgorithmConfig(Section):
    """Advantages, the loss, and the correction for samples of another policy."""

    advantage: str = "crpo"
    """Names the method. crpo: weighted statistics of the group (LENS, eq. 6). grpo: (r - mean) / std. dr_grpo, rloo, or
    your own as `module:attribute`."""
    advantage_options: dict[str, Any] = {}
    """The method's own options."""
    weights: Literal["none", "crpo"] | None = None
    """Says what multiplies the loss of a rollout. none: nothing. crpo: w~ (LENS, eq. 4). When empty: crpo with the
    advantage crpo, none with any other."""
    mask_truncated: bool = False
    """Leave rollouts that reached rollout.max_response_length out of the loss and of its denominators (DAPO's overlong
    filtering). They still count in the statistics of their groups."""
    weights_scope: Literal["all", "purified_only"] = "all"
    """Says whether every group gets crpo's weights, or only those in which the second wave counts."""
    loss_weight: Literal["raw", "normalised"] = "raw"
    """Says what multiplies the loss. raw: w~ does. normalised: group size * w~ / sum of w~ does."""
    advantage_eps: float = Field(1e-6, gt=0)
    """This number is added to the standard deviation that advantages are divided by."""
    objective: str = "clip"
    """The loss of a token with a given ratio. clip: PPO's, sapo, cispo, or your own as `module:attribute`."""
    objective_options: dict[str, Any] = {}
    """The objective's own options."""
    ratio: Literal["token", "sequence_geometric", "sequence"] = "token"
    """The importance ratio: one per token (PPO), the geometric mean of a response (GSPO), or the response's product."""
    ratio_form: Literal["v1", "acl"] = "v1"
    """Says what w~ changes. v1: it multiplies the loss. acl: it divides the old probability instead."""
    rescued_ratio: Literal["generation_prompt", "original_prompt"] = "generation_prompt"
    """The prompt of pi_old in the ratio of a rescued response. generation_prompt: the purified one that it was sampled
    from (LENS, eq. 5). original_prompt: the one that is trained on, so that the ratio is exactly 1 in the first update
    after sampling."""
    rescued_ratio_floor: float = Field(0.0, ge=0, le=1)
    """Smaller ratios of rescued responses with a positive advantage count as this one, and keep the gradient of log pi
    that goes with it. 0: no floor, as in LENS, eq. 7."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """Ratios are clipped at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """Ratios are clipped at 1 + clip_high."""
    dual_clip: float | None = Field(3.0, gt=1)
    """The loss of a token with a negative advantage is at most this many times the advantage. Empty: no such bound."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """Says how the tokens' losses become one number: the mean of all tokens, or the mean over responses of each
    response's mean, of its sum, or of its sum divided by rollout.max_response_length."""
    kl_coef: float = Field(0.001, ge=0)
    """Weight of the k3 estimate against the reference, on the original prompt. 0: no reference pass for it."""
    kl_limit: float | None = Field(None, gt=0)
    """Largest k3 estimate of a token, in nats; a token beyond it has no KL gradient. verl's is 10. None: no limit."""
    entropy_coef: float = Field(0.0, ge=0)
    """The weight of the policy's entropy, which is subtracted from the loss."""
    imitation_coef: float = Field(0.0, ge=0)
    """The weight of an extra negative log-likelihood of successes that came from purified prompts."""
    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "sequence_geometric_mask"
    ] = "none"
    """Weights for w = pi_trainer / pi_engine: TIS by token, IcePop, TIS by response, masks of responses. Any of them
    costs a forward pass over all samples; see algorithms/corrections.py."""
    correction_low: float = Field(0.5, ge=0, le=1)
    """Masks drop tokens or responses with w below it. Truncation has no lower bound."""
    correction_high: float = Field(2.0, ge=1)
    """Truncation cuts w off here. Masks drop what has w above it."""

    @property
    def loss_weights(self) -> Literal["none", "crpo"]:
        """`weights`, or what stands for an empty one."""
        return self.weights or ("crpo" if self.advantage == "crpo" else "none")
