"""TRL's functions, for oracle_worker.py. Responses are rows of matrices [N, T] that a mask of 0 and 1 goes with."""

import ast
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from in_float64 import tensor, with_gradient
from torch import Tensor
from trl.rewards import accuracy_reward, think_format_reward
from trl.trainer import grpo_trainer

TRAINER = grpo_trainer.GRPOTrainer


def advantages(rewards: list, group_size: int, scale: str) -> list:
    """Runs the one statement of TRL's that turns rewards into advantages; the method around it samples."""
    method = ast.parse(textwrap.dedent(inspect.getsource(TRAINER._generate_and_score_completions)))
    condition = "self.multi_objective_aggregation == 'sum_then_normalize'"
    (statement,) = [n for n in ast.walk(method) if isinstance(n, ast.If) and ast.unparse(n.test) == condition]
    options = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": scale}
    names: dict[str, Any] = {
        **vars(grpo_trainer),
        "self": SimpleNamespace(**options, reward_weights=tensor([1.0])),
        "rewards_per_func": tensor(rewards)[:, None],
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
        "num_generations": group_size,
        "device": torch.device("cpu"),
    }
    exec(compile(ast.Module([statement], []), "TRL's advantages", "exec"), names)
    return names["advantages"].tolist()


def policy_loss(
    name: str,
    log_probs: list,
    old: list,
    advantages: list,
    mask: list,
    weights: list | None,
    reference: list | None,
    options: dict,
    arguments: dict,
) -> dict:
    """`options` are those that a trainer takes from its arguments, and `arguments` the rest of these."""
    kept, no_ids = tensor(mask), torch.zeros(len(mask), 0)
    inputs = {
        "prompt_ids": no_ids,
        "prompt_mask": no_ids,
        "completion_ids": kept,
        "completion_mask": kept,
        "advantages": tensor(advantages),
        "old_per_token_logps": tensor(old),
        "num_items_in_batch": kept.sum(),
        "ref_per_token_logps": None if reference is None else tensor(reference),
        "importance_sampling_ratio": None if weights is None else tensor(weights),
    }
    options = {"loss_type": name, "use_vllm": weights is not None, **options}
    return with_gradient(lambda p: TRAINER._compute_loss(stand_in(p, options, arguments), STATELESS, inputs), log_probs)


STATELESS = SimpleNamespace()
"""Stands for the model, which the stand-in's forward pass does not need."""


def stand_in(log_probs: Tensor, options: dict, arguments: dict) -> SimpleNamespace:
    """What the method asks of a trainer: a forward pass, options, and a place for its metrics."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(**{"use_bias_correction_kl": False, "delta": None, **arguments}),
        aux_loss_enabled=False,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        vllm_importance_sampling_correction=True,
        **{"importance_sampling_level": "token", "beta": 0.0, **options},
    )


def scores(texts: list, solution: str) -> list[float]:
    """Accuracy, and a quarter for the right form."""
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    right = accuracy_reward(completions=completions, solution=[solution] * len(texts))
    form = think_format_reward(completions=completions)
    return [a + 0.25 * b for a, b in zip(right, form, strict=True)]
