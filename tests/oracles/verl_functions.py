"""verl's functions, for oracle_worker.py. Responses are rows of matrices [N, T] that a mask of 0 and 1 goes with."""

from typing import Any

import numpy
import torch
from in_float64 import tensor, with_gradient
from torch import Tensor
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils.reward_score import default_compute_score
from verl.workers.config import ActorConfig


def advantages(function: str, rewards: list, groups: list, options: dict) -> list:
    scores = tensor(rewards)[:, None]
    found, _ = getattr(core_algos, function)(scores, torch.ones_like(scores), numpy.array(groups), **options)
    return found[:, 0].tolist()


def policy_loss(
    name: str, log_probs: list, old: list, advantages: list, mask: list, weights: list | None, options: dict
) -> dict:
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    scale = config.loss_scale_factor
    config.global_batch_info.update({} if scale is None else {"loss_scale_factor": scale})
    metrics: dict[str, Any] = {}

    def loss(variable: Tensor) -> Tensor:
        found, more = core_algos.get_policy_loss_fn(name)(
            old_log_prob=tensor(old),
            log_prob=variable,
            advantages=tensor(advantages)[:, None].expand_as(variable),
            response_mask=tensor(mask),
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=None if weights is None else tensor(weights),
        )
        metrics.update(more)
        return found

    both = with_gradient(loss, log_probs)
    return {**both, "clipped": metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]}


def aggregate(losses: list, mask: list, mode: str, limit: int) -> float:
    return core_algos.agg_loss(tensor(losses), tensor(mask), mode, loss_scale_factor=limit).item()


def kl(log_probs: list, reference: list) -> dict:
    values = core_algos.kl_penalty(tensor(log_probs), tensor(reference), "low_var_kl")
    both = with_gradient(lambda p: core_algos.kl_penalty(p, tensor(reference), "low_var_kl").sum(), log_probs)
    return {**both, "values": values.tolist()}


def correction(log_ratio: list, mask: list, level: str, threshold: str) -> list:
    compute = rollout_corr_helper.compute_rollout_correction_weights
    return compute(tensor(log_ratio), tensor(mask), level, threshold)[0].tolist()


def rejection(log_ratio: list, mask: list, mode: str, threshold: str) -> list:
    compute = rollout_corr_helper.compute_rollout_rejection_mask
    return compute(tensor(log_ratio), tensor(mask), mode, threshold)[0].tolist()


def scores(cases: list) -> list[dict]:
    """Scores and verdicts on (data source, solution, ground truth), by the function that verl uses by default."""
    found = [default_compute_score(*case) for case in cases]
    return [score if isinstance(score, dict) else {"score": score, "acc": score >= 1} for score in found]
