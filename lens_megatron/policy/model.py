"""Builds the policy: Megatron GPTModel with Hugging Face weights, DDP, optimizer, schedule, frozen reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mbridge.core.bridge import Bridge
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor

from lens_megatron.algorithms.entry import Evidence
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.config import Config, ConfigError
from lens_megatron.config.layout_rules import model_mistakes
from lens_megatron.policy import passthrough
from lens_megatron.policy.export_plan import ExportPlan, plan_export
from lens_megatron.policy.guard import StateGuard
from lens_megatron.policy.hf_weights import build_bridge, import_weights, read_hf_config
from lens_megatron.policy.layers import PackedSequences
from lens_megatron.policy.parallel import Mesh
from lens_megatron.types import SequenceLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns hidden states, after the final norm; `policy.head` does what follows.

    Where sequences share prompts, every row gets the rotary embedding of its position.
    """

    def _preprocess(
        self, *args: Any, packed_seq_params: PackedSequences | None = None, **options: Any
    ) -> tuple[Any, ...]:
        found = super()._preprocess(*args, packed_seq_params=packed_seq_params, **options)
        if packed_seq_params is None or packed_seq_params.positions is None:
            return found
        embedded, rotary, *others = found
        return embedded, rotary[packed_seq_params.positions], *others

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Returns hidden states [S, B, D]; under sequence parallelism this rank's part, [S/tp, B, D]."""
        return hidden_states

    def head_weight(self) -> torch.nn.Parameter:
        """Returns [V/tp, D] on the last stage: the embedding's weight if they are tied, else the head's own."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


@dataclass(slots=True)
class Policy:
    """Holds the trained model on this rank, and what is needed to train it."""

    mesh: Mesh
    bridge: Bridge
    chunks: list[DistributedDataParallel]
    """DDP-wrapped model chunks of this rank's pipeline stage."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    export_plan: ExportPlan
    """Says which rank holds what of every tensor that `policy.export` streams."""
    reference: dict[str, Tensor] | None
    """The frozen reference policy's parameters of this rank, by Megatron name; None when nothing needs them."""
    shares_prompts: bool = False
    """Rollouts of the same prompt share its rows in a micro-batch (`train.share_prompts`)."""
    version: int = 0
    """The number of optimizer steps that have been done."""
    guard: StateGuard = field(default_factory=StateGuard)

    @property
    def vocab_size(self) -> int:
        """The number of tokens without padding: columns from here on stand for no token."""
        return self.bridge.hf_config.vocab_size

    @property
    def layout(self) -> SequenceLayout:
        """Says how this rank's part is cut out of a packed batch."""
        return replace(self.layout_of_whole_sequences, shares_prompts=self.shares_prompts)

    @property
    def layout_of_whole_sequences(self) -> SequenceLayout:
        """The layout for passes that need every sequence's own rows of its prompt."""
        divided = self.mesh.tp_size if self.bridge.config.sequence_parallel else 1
        return SequenceLayout(self.mesh.cp_rank, self.mesh.cp_size, divided)

    def models(self) -> list[HiddenStatesModel]:
        return unwrap_model(self.chunks)


def build_policy(config: Config, mesh: Mesh) -> Policy:
    """Loads `model.path` into this rank's shards, and `model.reference_path` (or `model.path`) as the reference.

    Raises:
        ModelError: the directory cannot be used. ConfigError: a layout or pass-through option Megatron refuses.
    """
    hf_config = read_hf_config(config.model.path)
    check_layout(config, hf_config)
    shares_prompts = _shares_prompts(config, mesh)
    bridge = build_bridge(
        hf_config,
        DTYPES[config.model.dtype],
        mesh.tp_size,
        config.megatron.sequence_parallel,
        shares_prompts=shares_prompts,
    )
    _set_passthrough(bridge, config.megatron.transformer)
    models = _build_models(bridge, mesh)
    needs_reference = config.algorithm.kl_coef > 0 or load_methods(config).need(Evidence.PROMPT_SCORES)
    reference = None
    if needs_reference:
        import_weights(bridge, models, config.model.reference_path or config.model.path)
        reference = {name: _pinned_copy(p) for name, p in named_parameters(models)}
    if not needs_reference or config.model.reference_path:
        import_weights(bridge, models, config.model.path)
    chunks = [_wrap(model, config) for model in models]
    optimizer = _build_optimizer(config, chunks)
    bridge.config.finalize_model_grads_func = _finalize_without_token_scaling
    bridge.config.grad_scale_func = optimizer.scale_loss
    plan = plan_export(bridge, models, mesh)
    scheduler = _build_scheduler(config, optimizer)
    return Policy(mesh, bridge, chunks, optimizer, scheduler, plan, reference, shares_prompts)


def _shares_prompts(config: Config, mesh: Mesh) -> bool:
    asked = config.train.share_prompts
    return mesh.device.type == "cpu" and mesh.cp_size == 1 if asked is None else asked


def check_layout(config: Config, hf_config: Any) -> None:
    """Raises ConfigError where the model cannot be cut as asked, or Megatron-Core not be configured so."""
    passthrough.check(config.megatron)
    for mistake in model_mistakes(config, hf_config):
        raise ConfigError(mistake)


@contextmanager
def reference_weights(policy: Policy) -> Iterator[None]:
    """Within the block the model computes with the reference policy's weights."""
    if policy.reference is None:
        raise RuntimeError(
            "this policy was built without a reference; set algorithm.kl_coef > 0 or lens.purifier=interference"
        )
    parameters = dict(named_parameters(policy.models()))
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = policy.reference[name].to(policy.mesh.device, non_blocking=True)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def named_parameters(models: list[HiddenStatesModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields the parameters of all chunks of this rank's stage; a chunk after the first is named in the prefix."""
    for chunk, model in enumerate(models):
        for name, parameter in model.named_parameters():
            yield f"chunk{chunk}.{name}" if chunk else name, parameter


def _pinned_copy(parameter: Tensor) -> Tensor:
    copy = parameter.detach().to("cpu", copy=True)
    return copy.pin_memory() if torch.cuda.is_available() else copy


def _set_passthrough(bridge: Bridge, options: dict[str, Any]) -> None:
    balancing = options.get("moe_router_load_balancing_type", "none")
    if balancing not in ("none", "aux_loss"):
        raise ConfigError(
            f"megatron.transformer.moe_router_load_balancing_type={balancing}: give none, or aux_loss, whose gradient "
            f"alone is known to be scaled as the policy's is"
        )
    try:
        bridge.set_extra_args(**options)
    except Exception as error:  # its checks raise any error, such as ZeroDivisionError for no heads
        raise ConfigError(f"megatron.transformer: Megatron-Core refuses {options}: {error}") from error


def _build_models(bridge: Bridge, mesh: Mesh) -> list[HiddenStatesModel]:
    def return_hidden_states(model: GPTModel, **_: Any) -> None:
        model.__class__ = HiddenStatesModel  # mbridge takes no class of model; ours adds methods only

    provider = bridge._model_provider([return_hidden_states])
    stages = range(mesh.vp_size) if mesh.vp_size > 1 else [None]
    models = [
        provider(
            pre_process=mesh.pp_rank == 0 and not stage,
            post_process=mesh.is_last_stage and stage in (None, mesh.vp_size - 1),
            vp_stage=stage,
        )
        for stage in stages
    ]
    return [model.to(device=mesh.device, dtype=bridge.dtype) for model in models]


def _wrap(model: GPTModel, config: Config) -> DistributedDataParallel:
    options = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.megatron.use_distributed_optimizer,
        **config.megatron.ddp,
    }
    try:
        ddp_config = DistributedDataParallelConfig(**options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"megatron.ddp: {error}") from error
    # Later chunks of a stage in one bucket, as Megatron-LM does: their gradients become ready together.
    later = bool(model.vp_stage)
    return DistributedDataParallel(model.config, ddp_config, model, disable_bucketing=later)


def _build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    ours = config.optimizer
    options = {
        "optimizer": "adam",
        "lr": ours.lr,
        "min_lr": ours.min_lr,
        "weight_decay": ours.weight_decay,
        "adam_beta1": ours.adam_beta1,
        "adam_beta2": ours.adam_beta2,
        "adam_eps": ours.adam_eps,
        "clip_grad": ours.clip_grad,
        "bf16": config.model.dtype == "bfloat16",
        "params_dtype": DTYPES[config.model.dtype],
        "use_distributed_optimizer": config.megatron.use_distributed_optimizer,
        **config.megatron.optimizer,
    }
    try:
        return get_megatron_optimizer(MegatronOptimizerConfig(**options), chunks)
    except Exception as error:  # Megatron raises a plain Exception for an optimizer that it does not know
        raise ConfigError(f"megatron.optimizer: {error}") from error


def _build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    ours = config.optimizer
    updates = max(1, config.train.steps * config.train.updates_per_batch)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if ours.lr_warmup_steps else ours.lr,
        max_lr=ours.lr,
        min_lr=ours.min_lr,
        lr_warmup_steps=min(ours.lr_warmup_steps, updates - 1),
        lr_decay_steps=updates,
        lr_decay_style=ours.lr_decay_style,
        start_wd=ours.weight_decay,
        end_wd=ours.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def _finalize_without_token_scaling(
    chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    # The loss arrives already divided by global counts, so Megatron's own division by tokens must not happen.
    finalize_model_grads(chunks, None, **kwargs)
