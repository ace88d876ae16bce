"""One YAML file and dotted overrides -> a validated, frozen `Config`.

Every option, its type, bound and meaning stands here once. `megatron.*` dictionaries pass through to Megatron-Core
under Megatron's own names. Rules over more than one option are in rules.py.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from lens_megatron.config import rules
from lens_megatron.config.files import ConfigError, apply_override, read_tree
from lens_megatron.config.section import Section, UserPath, explain

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class RunConfig(Section):
    directory: UserPath
    """Folder of this run: configuration, metrics, rollouts, checkpoints, pictures."""
    if_exists: Literal["resume", "restart", "fail"] = "resume"
    """What to do when the folder holds a run already. `restart` moves it aside, to NAME.old-1, and starts over."""
    seed: int = Field(0, ge=0, lt=2**31)
    phase_timeout_minutes: float = Field(60.0, ge=0, le=10_080)
    """A phase that lasts longer ends the run, with every rank's stacks and the late ranks' names. 0: never. At most a
    week: timers of the operating system and of the collectives overflow soon after."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages that the console shows. Other ranks than 0 show warnings and errors, and what is
    about their own servers and files."""
    tensorboard: bool = True
    save_rollout_files: bool = True


class ModelConfig(Section):
    path: UserPath
    """Hugging Face model directory (Qwen2, Qwen3 or Llama) with its tokenizer."""
    reference_path: UserPath | None = None
    """Frozen reference policy; the initial policy when empty."""
    dtype: Literal["float32", "bfloat16"] = "float32"


class DataConfig(Section):
    train: UserPath
    """A .jsonl or .parquet file, or the name of a Hugging Face dataset (`name` or `name:split`)."""
    eval: tuple[UserPath, ...] = ()
    problem_key: str | None = None
    """Column of the problem; found among problem, question, prompt when empty."""
    answer_key: str | None = None
    """Column of the answer; found among answer, solution, label, ground_truth when empty."""
    instruction: str = BOXED_INSTRUCTION
    """Appended to the problem after a newline; never purified."""
    system_prompt: str | None = None
    max_prompt_length: int = Field(512, ge=1)
    """Tokens, template included; longer prompts are dropped and counted."""
    shuffle: bool = True


class RolloutConfig(Section):
    engine: Literal["local", "vllm", "vllm_server"] = "local"
    """local: transformers, a whole model in every process. vllm: colocated in the trainer's processes. vllm_server: in
    processes of their own, here or on other machines."""
    servers: int | tuple[str, ...] = 1
    """Of vllm_server: how many to start, each beside the rank that drives it; or addresses of running ones,
    http://host:port. Server i is driven by rank i modulo the number of ranks."""
    prompts_per_step: int = Field(128, ge=1)
    rollouts_per_prompt: int = Field(8, ge=1, le=10_000)
    max_response_length: int = Field(1024, ge=1)
    """Tokens per completion."""
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    """Below the lower bound logits overflow."""
    max_running_sequences: int = Field(256, ge=1, le=65_536)
    """Sequences that one engine decodes at once."""
    offload_trainer: bool | None = None
    """Keep the trainer's weights, gradients and optimizer state in host memory while the engine samples. Default: on a
    GPU with engine=vllm."""
    schedule: Literal["speculative", "streamed", "sequential"] = "speculative"
    """When the second wave of a group starts. speculative: as soon as the engine has room, for the group that looks
    hardest; it is taken back if the group turns out not to be hard. streamed: as soon as the group is certainly hard.
    sequential: after all first waves; this is the benchmark's yardstick. All three sample the same groups. Simulated
    for 8 A800, a whole step takes 1.12 to 1.16, 1.42 and 1.42 times as long as one of GRPO; on a CPU, where a step of
    the engine costs the same whatever runs, sampling alone was measured at 1.14, 1.43 and 1.83 times
    (benchmarks/ROLLOUT_NOTES.md)."""
    off_policy_steps: Literal[0, 1] = 0
    """1: the next step is sampled while this one trains, by the policy before its updates. With the engines that have
    memory of their own, `local` and `vllm_server`."""
    share_work: bool | None = None
    """All engines take requests from one queue, so that none is idle while another has much to do. Which engine serves
    a request is then a matter of timing, and log-probabilities differ by rounding from run to run. Default: only with
    `vllm_server`, whose servers may be fewer than the ranks. Between engines in the trainer's processes no gain was
    measured: sampling took 2.0 s with it and 1.9 s without, engines were idle for 14 % and 15 % of that time."""

    @property
    def shares_work(self) -> bool:
        """`share_work`, or its default."""
        return self.engine == "vllm_server" if self.share_work is None else self.share_work

    @field_validator("servers", mode="before")
    @classmethod
    def check_servers(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            bad = [v for v in value if not isinstance(v, str) or not _is_address(v)]
            if bad or not value or len(set(value)) < len(value):
                raise ValueError("expected different addresses such as [http://10.0.0.7:8000]")
        elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
            raise ValueError("expected a number of servers, 1 to 1024, or a list of their addresses")
        return value


def _is_address(text: str) -> bool:
    found = re.fullmatch(r"http://[^/:\s@?#\0]{1,253}:([0-9]{1,5})", text)
    return found is not None and 0 < int(found[1]) < 2**16


class RewardConfig(Section):
    grader: str = "math_verify"
    """A registered grader, or `module:function`."""
    timeout_s: float = Field(5.0, ge=1e-3, le=86_400)
    """Wall-clock limit for one answer, from the start of its grading. At most a day."""
    workers_per_rank: int = Field(1, ge=1, le=256)
    """Processes that grade, of which every rank has its own; at most 16 for each of the machine's cores."""


class LensConfig(Section):
    """Instruction purification. Defaults are the readings of the paper that this project takes."""

    enabled: bool = True
    """False: plain group sampling (GRPO and its kin), same program."""
    tau: float = Field(0.5, ge=0, le=1)
    """A prompt with a success rate strictly below tau is hard and sampled again, purified."""
    deletion_ratio: float = Field(0.03, gt=0, lt=1)
    """gamma: share of tokens to delete, rounded up."""
    eligible: Literal["problem", "user", "all_nonspecial", "all"] = "problem"
    """Tokens that may be deleted: the problem text; the user turn, instruction too; all but special ones; all."""
    protect_whitespace: bool = True
    ratio_base: Literal["eligible", "full"] = "eligible"
    """What the deletion ratio is a share of."""
    deletion: Literal["ids", "text"] = "ids"
    """Delete token ids, or delete and tokenize the remaining text again."""
    min_score: float = Field(1e-4, ge=0)
    """Noise floor in nats: a prompt whose highest score is below it is not purified."""
    tie_break: Literal["position", "random"] = "position"
    gate: Literal["strict", "always"] = "strict"
    """strict: the second wave counts only if its success rate is higher than the first's."""
    cap_rescued: bool = False
    """Add at most as many successes as failures were removed, so that the group keeps its size."""
    min_keep_failures: int = Field(0, ge=0)
    """Failures of the first wave that always stay in the group."""


class AlgorithmConfig(Section):
    advantage: Literal["crpo", "grpo"] = "crpo"
    """crpo: weighted group statistics and weights (LENS, eq. 4-6); grpo: (r - mean) / std, weight 1."""
    weights_scope: Literal["all", "purified_only"] = "all"
    loss_weight: Literal["raw", "normalised"] = "raw"
    """raw: w~ multiplies the loss; normalised: group size * w~ / sum of w~."""
    advantage_eps: float = Field(1e-6, gt=0)
    ratio: Literal["token", "sequence_geometric", "sequence"] = "token"
    ratio_form: Literal["v1", "acl"] = "v1"
    """acl: w~ divides the old probability instead of multiplying the loss."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(3.0, gt=1)
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    kl_coef: float = Field(0.001, ge=0)
    """Weight of the k3 estimate against the reference, on the original prompt. 0: no reference pass for it."""
    entropy_coef: float = Field(0.0, ge=0)
    imitation_coef: float = Field(0.0, ge=0)
    """Weight of an extra negative log-likelihood of the rescued successes."""
    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "sequence_geometric_mask"
    ] = "none"
    """Weights for w = pi_trainer / pi_engine: TIS by token, IcePop, TIS by response, masks of responses. Any of them
    costs a forward pass over all samples; see algorithms/corrections.py."""
    correction_low: float = Field(0.5, ge=0, le=1)
    """Masks drop what has w below it; truncation has no lower bound."""
    correction_high: float = Field(2.0, ge=1)
    """Truncation cuts w off here, masks drop what is above."""


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)


class TrainConfig(Section):
    steps: int = Field(300, ge=0)
    """Rollout batches to train on."""
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    """Prompt and response tokens that one forward-backward pass packs together; a longer sample goes alone."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps per rollout batch; more than one makes the later ones off-policy."""
    eval_interval: int = Field(20, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step."""
    eval_samples: int = Field(1, ge=1, le=10_000)
    eval_temperature: float = Field(1.0, ge=0, le=1e3)
    """0: greedy; else 0.001 or more."""
    save_interval: int = Field(20, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in host memory."""
    save_total_limit: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    save_best_limit: int = Field(0, ge=0)
    """Best checkpoints to keep besides; only steps with both a save and an evaluation take part."""
    metric_for_best_model: str | None = None
    """E.g. `val-core/math500/acc/mean@1`; the mean of all `val-core/` accuracies when empty. Higher is better."""
    max_skipped_updates: int = Field(3, ge=0)
    """Updates in a row skipped for a loss or gradient that is not finite, before training stops. 0: never stop."""


class MegatronConfig(Section):
    """Layout, and options passed through to Megatron-Core under their own names."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: int = Field(1, ge=1)
    sequence_parallel: bool = False
    """Divide the rows of norms and residuals among tensor-parallel ranks."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Divide experts among this many ranks of a stage: tensor-, context- and data-parallel ones alike."""
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    """Cut each expert's matrices among this many ranks; default: tensor_model_parallel_size."""
    use_distributed_optimizer: bool = False
    transformer: dict[str, Any] = {}
    """Fields of megatron.core.transformer.TransformerConfig."""
    ddp: dict[str, Any] = {}
    """Fields of megatron.core.distributed.DistributedDataParallelConfig; overlap_param_gather is refused."""
    optimizer: dict[str, Any] = {}
    """Fields of megatron.core.optimizer.OptimizerConfig."""


class VllmConfig(Section):
    """vLLM's engine options under their own names; any other than these is passed through as it is, but for those that
    the trainer sets (rollout/vllm_options.py: OWNED)."""

    model_config = ConfigDict(extra="allow")

    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    """Share of the GPU that weights, KV cache and workspace of the engine may take, as vLLM counts it."""

    def narrowed(self) -> str | None:
        """An option with which the engine's log-probabilities are not those of the whole distribution sampled from."""
        extra = self.model_extra or {}
        if extra.get("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            return f"vllm.logprobs_mode={extra['logprobs_mode']}"
        if extra.get("override_generation_config"):
            return "vllm.override_generation_config"
        return None


class ClusterConfig(Section):
    """The machines that `lens_megatron.plan` reckons with. Training takes what torchrun gives it."""

    gpu: Literal["A800-80GB", "A100-80GB", "H800-80GB", "H100-80GB", "H200-141GB"] = "A800-80GB"
    """Names memory, arithmetic, memory bandwidth and links: lens_megatron/tools/planning/hardware.py."""
    nodes: int = Field(1, ge=1, le=100_000)
    gpus_per_node: int = Field(8, ge=1, le=1024)
    gpu_memory_gib: float | None = Field(None, gt=0)
    """What torch reports as the GPU's total memory; the table's when empty."""
    host_memory_gib: float = Field(1024, gt=0)
    """Of one node; the reference policy is kept there."""
    network_gb_s: float = Field(100, gt=0)
    """Gigabytes per second that leave a node in one direction: 4 x 200 Gb/s are 100."""


class DebugConfig(Section):
    save_rollouts: UserPath | None = None
    """Folder to write each step's graded groups to, for `load_rollouts`."""
    load_rollouts: UserPath | None = None
    """Folder written by `save_rollouts`: train on it, sample nothing."""
    rollout_only: bool = False
    """Sample and grade, never update."""


class Config(Section):
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    lens: LensConfig = LensConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    megatron: MegatronConfig = MegatronConfig()
    vllm: VllmConfig = VllmConfig()
    cluster: ClusterConfig = ClusterConfig()
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def check(self) -> Self:
        for mistake in rules.mistakes(self):
            raise ValueError(mistake)
        return self

    @property
    def ranks_per_engine(self) -> int:
        """Consecutive ranks that hold one engine together."""
        return self.vllm.tensor_parallel_size if self.rollout.engine == "vllm" else 1

    def check_world(self, world_size: int, ranks_per_node: int | None = None) -> None:
        """Raises ConfigError unless `world_size` processes can carry the layout and the batch."""
        for mistake in rules.world_mistakes(self, world_size, ranks_per_node or world_size):
            raise ConfigError(mistake)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` (YAML) over the files it names as `base`, applies `a.b=value` overrides and validates.

    Raises:
        ConfigError: missing file, bad YAML, unknown option (with the nearest valid one), wrong type or bound.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Validates nested mappings, as YAML gives them. Raises ConfigError listing every mistake, one per line."""
    if isinstance(tree, Mapping):  # a section whose options are all commented out
        tree = {name: section for name, section in tree.items() if section is not None}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e, Config, all_options()) for e in error.errors())) from None
    try:
        config.model_dump_json()
    except (ValueError, RecursionError) as error:  # YAML can say things that no file of the run could hold
        raise ConfigError(f"configuration: a value cannot be saved: {error}; write plain values") from None
    return config


def all_options() -> list[str]:
    """Dotted names of every option."""
    return [f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields]
