"""Declares every option of a run once: its type, its bound and its meaning.

Sections are frozen pydantic models. The dictionaries under `megatron` pass through to Megatron-Core under Megatron's
own names, other options under `vllm` to vLLM. Rules over more than one option are in rules.py, YAML files in files.py;
loading.py makes a `Config` from both.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from lens_megatron.config.method_options import AlgorithmConfig, LensConfig, RewardConfig, SelectionConfig
from lens_megatron.config.section import Section, UserPath

logger = logging.getLogger(__name__)

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class RunConfig(Section):
    """Says where a run keeps its files, and how it is watched."""

    directory: UserPath
    """The run's folder: configuration, metrics, rollouts, checkpoints and pictures are written there."""
    if_exists: Literal["resume", "restart", "fail"] = "resume"
    """Says what to do when the folder holds a run already. resume: go on from its last checkpoint. restart: move it
    aside, to NAME.old-1, and start over. fail: end with an error."""
    seed: int = Field(0, ge=0, lt=2**31)
    """All random choices of a run are functions of this number."""
    phase_timeout_minutes: float = Field(60.0, ge=0, le=10_080)
    """A phase that lasts longer ends the run, with every rank's stacks and the late ranks' names. 0: never. At most a
    week: timers of the operating system and of the collectives overflow soon after."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages that the console shows. Other ranks than 0 show warnings and errors, and what is
    about their own servers and files."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Write the metrics for these too: TensorBoard, into tensorboard/, Weights & Biases and trackio. The last two need
    a library of their own. None of them can end a run, and metrics.jsonl has everything that they get."""
    save_rollout_files: bool = True
    """Write every rollout with its grade into rollouts/."""

    @model_validator(mode="before")
    @classmethod
    def read_tensorboard(cls, section: Any) -> Any:
        """Reads `tensorboard: true` or `false`, the option before there were `trackers`."""
        if not isinstance(section, Mapping) or "tensorboard" not in section:
            return section
        rest = {name: value for name, value in section.items() if name != "tensorboard"}
        wanted = section["tensorboard"]
        if not isinstance(wanted, bool):
            raise ValueError(f"run.tensorboard: {wanted!r}: expected true or false; better, set run.trackers instead")
        if "trackers" in rest:
            raise ValueError("run.tensorboard and run.trackers are both set; remove run.tensorboard, the older one")
        trackers = ["tensorboard"] if wanted else []
        # As information and not as a warning: every rank shows its warnings.
        logger.info(f"run.tensorboard={str(wanted).lower()} is deprecated; set run.trackers=[{', '.join(trackers)}]")
        return rest | {"trackers": trackers}


class ModelConfig(Section):
    """The policy, and the reference policy that it is held to."""

    path: UserPath
    """A Hugging Face model directory (Qwen2, Qwen3, Qwen3-MoE or Llama family) with its tokenizer, or the name of one
    on the hub (`owner/name` or `owner/name@revision`)."""
    reference_path: UserPath | None = None
    """The frozen reference policy. When empty it is the policy that training begins with."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of weights and activations. With bfloat16 the optimizer keeps a float32 copy of the weights."""


class DataConfig(Section):
    """Problems and answers, and how a prompt is made of them."""

    train: UserPath
    """A .jsonl or .parquet file, or the name of a Hugging Face dataset (`name` or `name:split`)."""
    eval: tuple[UserPath, ...] = ()
    """Files or datasets to evaluate on, in the same forms. When empty nothing is evaluated."""
    problem_key: str | None = None
    """The column of the problem. When empty: the first of problem, question and prompt that is there."""
    answer_key: str | None = None
    """The column of the answer. When empty: the first of answer, solution, label and ground_truth that is there."""
    noise_key: str | None = None
    """The column of noise that the data's author knows of: a list of [start, end) characters of the problem, for
    lens.purifier=oracle. A row without the column has no noise."""
    instruction: str = BOXED_INSTRUCTION
    """This text is appended to the problem after a newline. It is never purified."""
    system_prompt: str | None = None
    """The system turn of conversations that have none of their own."""
    max_prompt_length: int = Field(512, ge=1)
    """Tokens of a prompt, the chat template's included. Longer prompts are dropped and counted."""
    shuffle: bool = True
    """Take the prompts of every epoch in another random order. Otherwise they come in the order of the file."""


class RolloutConfig(Section):
    """Says what is sampled in a step, by which engine, and when."""

    engine: Literal["local", "vllm", "vllm_server"] = "local"
    """Says what samples. local: transformers, a whole model in every process. vllm: vLLM in the trainer's processes.
    vllm_server: vLLM in processes of their own, here or on other machines."""
    servers: int | tuple[str, ...] = 1
    """With vllm_server: how many servers to start, each beside the rank that drives it; or the addresses of running
    ones, http://host:port. Server i is driven by rank i modulo the number of ranks."""
    prompts_per_step: int = Field(128, ge=1)
    """Prompts that are sampled in one step, all ranks together."""
    rollouts_per_prompt: int = Field(8, ge=1, le=10_000)
    """Completions of one prompt in one wave: the size of a group."""
    max_response_length: int = Field(1024, ge=1)
    """Tokens of a completion, at most."""
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    """Logits are divided by it. Below the lower bound they overflow."""
    max_running_sequences: int = Field(256, ge=1, le=65_536)
    """Sequences that one engine decodes at once, at most."""
    offload_trainer: bool | None = None
    """Keep the trainer's weights, gradients and optimizer state in host memory while the engine samples. When empty:
    only on a GPU with engine=vllm."""
    schedule: Literal["speculative", "streamed", "sequential"] = "speculative"
    """Says when the second wave of a group starts. speculative: as soon as the engine has room, for the group that
    looks hardest; it is taken back if the group turns out not to be hard. streamed: as soon as the group is certainly
    hard. sequential: after all first waves; this is the benchmark's yardstick. All three sample the same groups.
    Simulated for 8 A800, a whole step takes 1.12 to 1.16, 1.42 and 1.42 times as long as one of GRPO; on a CPU, where a
    step of the engine costs the same whatever runs, sampling alone was measured at 1.14, 1.43 and 1.83 times
    (benchmarks/ROLLOUT_NOTES.md)."""
    off_policy_steps: Literal[0, 1] = 0
    """With 1 the next step is sampled while this one trains, by the policy before its updates. The engine must have
    memory of its own: `local` or `vllm_server`."""
    share_work: bool | None = None
    """All engines take requests from one queue, so that none is idle while another has much to do. Which engine serves
    a request is then a matter of timing, and log-probabilities differ by rounding from run to run. When empty: only
    with `vllm_server`, whose servers may be fewer than the ranks. Between engines in the trainer's processes no gain
    was measured: sampling took 2.0 s with it and 1.9 s without, engines were idle for 14 % and 15 % of that time."""

    @property
    def shares_work(self) -> bool:
        """`share_work`, or what stands for an empty one."""
        return self.engine == "vllm_server" if self.share_work is None else self.share_work

    @field_validator("servers", mode="before")
    @classmethod
    def check_servers(cls, value: Any) -> Any:
        """Raises ValueError unless `value` is a number of servers or a list of different addresses."""
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


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, and its learning rate."""

    lr: float = Field(1e-6, gt=0)
    """The highest learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """The learning rate at which a decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Says how the learning rate falls from lr to min_lr over train.steps, wherever train.epochs ends the training.
    constant: it does not."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0 to lr."""
    weight_decay: float = Field(0.01, ge=0)
    """The share of a weight that a step with learning rate 1 would take away."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """The decay of the gradients' running mean."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """The decay of the squared gradients' running mean."""
    adam_eps: float = Field(1e-8, gt=0)
    """This number is added to the root of the squared gradients' mean."""
    clip_grad: float = Field(1.0, ge=0)
    """Gradients whose norm over the whole model is larger are scaled down to it. 0: no bound."""


class TrainConfig(Section):
    """Steps, micro-batches, evaluations and checkpoints."""

    steps: int = Field(300, ge=0)
    """Steps of training: batches of rollouts that are sampled and trained on."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data after which training ends, if `steps` does not end it first: the step that completes them is
    the last. Prompts that a selection skips count as passed. Empty: only `steps` counts. A learning rate that decays
    does so over `steps`."""
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    """Prompt and response tokens that one forward-backward pass packs together. A longer sample goes alone."""
    share_prompts: bool | None = None
    """Compute the tokens of a prompt once for all its rollouts, in updates and in the passes before them. Results
    differ by rounding. Not with context parallelism. When empty: on a CPU."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts. With more than one the later ones are off-policy."""
    eval_interval: int = Field(20, ge=0)
    """Steps between evaluations. 0: only before the first and after the last step."""
    eval_samples: int = Field(1, ge=1, le=10_000)
    """Completions of every problem in an evaluation."""
    eval_temperature: float = Field(1.0, ge=0, le=1e3)
    """The temperature of evaluations: 0 for greedy decoding, else 0.001 or more."""
    eval_protocol: str | None = None
    """A protocol of lens-eval, by its name or as a YAML file: evaluations then ask and sample as it says, so that they
    can be compared with published numbers. When empty: as in training, with eval_samples and eval_temperature."""
    save_interval: int = Field(20, ge=1)
    """Steps between checkpoints. The last step is always saved."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in host memory."""
    save_total_limit: int = Field(2, ge=1)
    """The number of newest checkpoints that are kept."""
    save_best_limit: int = Field(0, ge=0)
    """The number of best checkpoints that are kept besides. Only steps with both a save and an evaluation take part."""
    metric_for_best_model: str | None = None
    """E.g. `val-core/math500/acc/mean@1`. When empty: the mean of all `val-core/` accuracies. Higher is better."""
    max_skipped_updates: int = Field(3, ge=0)
    """Training stops after this number of updates in a row that are skipped because loss or gradient is not finite. 0:
    it never does."""

    def ends(self, step: int, epoch: float) -> bool:
        """Returns whether training ends after `step`, at whose end `epoch` passes over the data have been made."""
        return step >= self.steps or (self.epochs is not None and epoch >= self.epochs)


class MegatronConfig(Section):
    """The layout, and options that pass through to Megatron-Core under their own names."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks among which every layer's matrices are cut."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Stages among which the layers are divided."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks among which the rows of every sequence are divided."""
    sequence_parallel: bool = False
    """Divide the rows of norms and residuals among tensor-parallel ranks."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Divide experts among this many ranks of a stage: tensor-, context- and data-parallel ones alike."""
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    """Cut each expert's matrices among this many ranks. When empty: tensor_model_parallel_size."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer's state among data- and context-parallel ranks."""
    transformer: dict[str, Any] = {}
    """Fields of megatron.core.transformer.TransformerConfig."""
    ddp: dict[str, Any] = {}
    """Fields of megatron.core.distributed.DistributedDataParallelConfig. overlap_param_gather is refused."""
    optimizer: dict[str, Any] = {}
    """Fields of megatron.core.optimizer.OptimizerConfig."""


class VllmConfig(Section):
    """vLLM's engine options under their own names. Any other than these is passed through as it is, but for those that
    the trainer sets (rollout/vllm/options.py: OWNED)."""

    model_config = ConfigDict(extra="allow")

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs among which one engine is cut: with engine=vllm those of as many consecutive ranks of a node."""
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    """The share of the GPU that weights, KV cache and workspace of the engine may take, as vLLM counts it."""

    def narrowed(self) -> str | None:
        """Returns the option with which the engine's log-probabilities are not those of the whole distribution sampled
        from, with its value; None if there is none."""
        extra = self.model_extra or {}
        if extra.get("logprobs_mode", "processed_logprobs") != "processed_logprobs":
            return f"vllm.logprobs_mode={extra['logprobs_mode']}"
        if extra.get("override_generation_config"):
            return "vllm.override_generation_config"
        return None


class ClusterConfig(Section):
    """The machines that `lens_megatron.plan` reckons with. Training takes what torchrun gives it."""

    gpu: Literal["A800-80GB", "A100-80GB", "H800-80GB", "H100-80GB", "H200-141GB"] = "A800-80GB"
    """The GPU, which stands for memory, arithmetic, bandwidths: see lens_megatron/tools/planning/hardware.py."""
    nodes: int = Field(1, ge=1, le=100_000)
    """Machines of the cluster."""
    gpus_per_node: int = Field(8, ge=1, le=1024)
    """GPUs of one machine, with one training process each."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """The GPU's total memory, as torch reports it. When empty: the table's number."""
    host_memory_gib: float = Field(1024, gt=0)
    """Host memory of one node, where the reference policy and, while the engine samples, the trainer's state are."""
    network_gb_s: float = Field(100, gt=0)
    """Gigabytes per second that leave a node in one direction: 4 x 200 Gb/s are 100."""


class DebugConfig(Section):
    """Runs sampling and training apart from each other."""

    save_rollouts: UserPath | None = None
    """A folder to write each step's graded groups to, for `load_rollouts`."""
    load_rollouts: UserPath | None = None
    """A folder written by `save_rollouts`: train on all of its groups, whatever `selection.method` is, and sample
    nothing."""
    rollout_only: bool = False
    """Sample and grade, but never update."""


class Config(Section):
    """Holds all sections. `loading.load` and `loading.from_tree` make one, and refuse what rules.py refuses."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    selection: SelectionConfig = SelectionConfig()
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

    @property
    def ranks_per_engine(self) -> int:
        """Consecutive ranks that hold one engine together."""
        return self.vllm.tensor_parallel_size if self.rollout.engine == "vllm" else 1
