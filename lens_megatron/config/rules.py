"""Checks rules over more than one option. Every message names both values and the remedy."""

import math
import os.path
from collections.abc import Iterator

from lens_megatron.config import method_rules
from lens_megatron.config.files import ConfigError
from lens_megatron.config.options import Config
from lens_megatron.reward.limits import PROCESSES_PER_CORE, most_processes

COLDEST = 1e-3
"""The lowest temperature but 0. `rollout.temperature` has it as its bound."""


def mistakes(config: Config) -> Iterator[str]:
    """Returns what is wrong with a configuration on any machine."""
    rollouts, keep = config.rollout.rollouts_per_prompt, config.lens.min_keep_failures
    if keep > rollouts:
        yield (f"lens.min_keep_failures ({keep}) exceeds rollout.rollouts_per_prompt ({rollouts}); lower it")
    yield from method_rules.mistakes(config)
    prompts, updates = config.rollout.prompts_per_step, config.train.updates_per_batch
    if prompts % updates:
        yield (
            f"rollout.prompts_per_step ({prompts}) is not divisible by train.updates_per_batch ({updates}); "
            "choose a divisor"
        )
    if config.train.save_best_limit and not config.data.eval:
        yield ("train.save_best_limit compares evaluations; set data.eval or unset it")
    if config.debug.rollout_only and config.debug.load_rollouts:
        yield ("debug.rollout_only and debug.load_rollouts exclude each other; unset one")
    correction, ratio = config.algorithm.correction, config.algorithm.ratio
    if correction.startswith("token") and ratio != "token":
        yield (
            f"algorithm.correction={correction} weighs tokens, algorithm.ratio={ratio} whole responses; "
            "choose a sequence_ correction or algorithm.ratio=token"
        )
    yield from _packing_mistakes(config)
    if config.rollout.off_policy_steps:
        yield from _off_policy_mistakes(config)
    if narrowed := config.vllm.narrowed():
        yield (
            f"{narrowed}: sampled tokens would have other probabilities than the trainer's, so ratios would be "
            "wrong; remove it"
        )
    offloads = config.rollout.offload_trainer
    if config.rollout.engine == "vllm" if offloads is None else offloads:
        fixed = [("ddp", "nccl_ub"), ("transformer", "enable_cuda_graph"), ("transformer", "cuda_graph_impl")]
        for section, name in fixed:
            if getattr(config.megatron, section).get(name) not in (None, False, "none"):
                yield (
                    f"megatron.{section}.{name} needs buffers that stay where they are, rollout.offload_trainer "
                    "gives their memory up; remove it or set rollout.offload_trainer=false"
                )
    if 0 < config.train.eval_temperature < COLDEST:
        yield (
            f"train.eval_temperature ({config.train.eval_temperature}) is not 0 and below {COLDEST}, where logits "
            "overflow; set it to 0 (greedy) or raise it"
        )
    if config.data.problem_key and config.data.problem_key == config.data.answer_key:
        yield (
            f"data.problem_key and data.answer_key are both {config.data.problem_key!r}, so that every problem would "
            "be its own answer; name two columns"
        )
    saved, loaded = config.debug.save_rollouts, config.debug.load_rollouts
    if saved and loaded and os.path.realpath(saved) == os.path.realpath(loaded):
        yield (
            f"debug.save_rollouts and debug.load_rollouts are one folder ({saved}), whose files would be overwritten "
            "by what is read from them; choose two"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        yield (f"optimizer.min_lr ({config.optimizer.min_lr}) exceeds optimizer.lr ({config.optimizer.lr}); lower it")


def _packing_mistakes(config: Config) -> Iterator[str]:
    cp = config.megatron.context_parallel_size
    if config.train.share_prompts and cp > 1:
        yield (
            f"train.share_prompts=true and megatron.context_parallel_size ({cp}) exclude each other, since the "
            "ranks cut every sequence; leave share_prompts empty, or set the size to 1"
        )


def _off_policy_mistakes(config: Config) -> Iterator[str]:
    if config.rollout.engine == "vllm":
        yield (
            "rollout.off_policy_steps=1 samples while the trainer trains, rollout.engine=vllm in the trainer's "
            "memory; choose vllm_server, or set it to 0"
        )
    if config.algorithm.correction == "none":
        yield (
            "rollout.off_policy_steps=1 trains on samples of an older policy; algorithm.correction=none takes them "
            "for the current one's; choose token_truncate or another correction"
        )


def check_world(config: Config, world_size: int, ranks_per_node: int | None = None) -> None:
    """Raises ConfigError unless `world_size` processes can carry the layout and the batch.

    Args:
        ranks_per_node: the processes of one machine; all of them by default.
    """
    for mistake in world_mistakes(config, world_size, ranks_per_node or world_size):
        raise ConfigError(mistake)


def world_mistakes(config: Config, world_size: int, ranks_per_node: int) -> Iterator[str]:
    """Returns why `world_size` processes cannot carry layout and batch. Later reasons may follow from the first."""
    size = config.ranks_per_engine
    for count, where in ((world_size, "world size"), (ranks_per_node, "the ranks of a node")):
        if count % size:
            yield (
                f"vllm.tensor_parallel_size ({size}) does not divide {where} ({count}): consecutive ranks of one "
                f"node hold an engine together; choose a divisor of {count}"
            )
    servers = config.rollout.servers
    count = servers if isinstance(servers, int) else len(servers)
    if config.rollout.engine == "vllm_server" and not config.rollout.shares_work and count < world_size:
        yield (
            f"rollout.servers ({count}) are fewer than the ranks ({world_size}), and with rollout.share_work=false a "
            "rank without a server cannot sample; leave share_work empty, or start more"
        )
    tp, pp = config.megatron.tensor_model_parallel_size, config.megatron.pipeline_model_parallel_size
    cp = config.megatron.context_parallel_size
    if world_size % (tp * pp * cp):
        yield (
            f"world size {world_size} is not divisible by megatron.tensor_model_parallel_size ({tp}) x "
            f"megatron.pipeline_model_parallel_size ({pp}) x megatron.context_parallel_size ({cp}) = "
            f"{tp * pp * cp}; start torchrun with a multiple of {tp * pp * cp} processes or change the layout"
        )
    ep, etp = config.megatron.expert_model_parallel_size, config.megatron.expert_tensor_parallel_size or tp
    if world_size % (ep * etp * pp):
        yield (
            f"world size {world_size} is not divisible by megatron.expert_model_parallel_size ({ep}) x "
            f"expert_tensor_parallel_size ({etp}; by default tensor_model_parallel_size) x "
            f"pipeline_model_parallel_size ({pp}) = {ep * etp * pp}; start torchrun with a multiple of "
            f"{math.lcm(ep * etp * pp, tp * pp * cp)} processes or change the layout"
        )
    dp, updates = world_size // (tp * pp * cp), config.train.updates_per_batch
    if config.rollout.prompts_per_step % (dp * updates):
        yield (
            f"rollout.prompts_per_step ({config.rollout.prompts_per_step}) is not divisible by data-parallel size "
            f"({dp}) x train.updates_per_batch ({updates}); choose a multiple of {dp * updates}"
        )


def machine_mistakes(config: Config, ranks_here: int, cores: int) -> Iterator[str]:
    """Returns what this machine, with `ranks_here` training processes on `cores` cores, cannot carry."""
    per_rank, most = config.reward.workers_per_rank, most_processes(cores, ranks_here)
    if per_rank * ranks_here > most:
        yield (
            f"reward.workers_per_rank ({per_rank}) x {ranks_here} ranks on this machine = {per_rank * ranks_here} "
            f"grading processes, more than {PROCESSES_PER_CORE} for each of its {cores} cores; lower it to "
            f"{most // ranks_here} or less"
        )
