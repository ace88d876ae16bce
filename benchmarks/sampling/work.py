"""Describes the paper's setting for the simulation: groups with long tails, and an A800. All numbers are assumed."""

import math
import random
from dataclasses import dataclass

from benchmarks.sampling.simulator import Cost, SimulatedGroup
from lens_megatron.tools.planning.hardware import GPUS


@dataclass(frozen=True, slots=True)
class Work:
    """Lengths are median x a log-normal factor of prompt and rollout each, x `wrong_factor` for wrong ones, capped."""

    name: str
    alpha: float = 0.8
    beta: float = 0.8
    """Success rates of prompts are Beta(alpha, beta)."""
    purified_gain: float = 0.15
    """The purified prompt's success rate is p + gain * (1 - p)."""
    median: float = 700.0
    prompt_sigma: float = 0.5
    rollout_sigma: float = 0.5
    wrong_factor: float = 1.6
    prompts: int = 128
    rollouts: int = 8
    limit: int = 4096
    prompt_tokens: int = 150


WORKS = (
    Work("half_hard"),
    Work("few_hard", alpha=1.2, beta=0.6),
    Work("many_hard", alpha=0.6, beta=1.2),
    Work("short_tail", prompt_sigma=0.3, rollout_sigma=0.25, wrong_factor=1.2),
    Work("independent_lengths", prompt_sigma=0.0, rollout_sigma=0.7, wrong_factor=1.0),
    Work("heavy_tail", prompt_sigma=0.7, rollout_sigma=0.7, wrong_factor=2.0),
)


def draw(work: Work, seed: int) -> list[SimulatedGroup]:
    random_ = random.Random(seed)
    return [_group(work, random_) for _ in range(work.prompts)]


def _group(work: Work, random_: random.Random) -> SimulatedGroup:
    rate = random_.betavariate(work.alpha, work.beta)
    scale = work.median * math.exp(random_.gauss(0, work.prompt_sigma))

    def wave(p: float) -> tuple[tuple[int, bool], ...]:
        drawn = []
        for _ in range(work.rollouts):
            correct = random_.random() < p
            tokens = scale * math.exp(random_.gauss(0, work.rollout_sigma)) * (1 if correct else work.wrong_factor)
            # What was cut at the limit has no answer.
            drawn.append((max(1, min(work.limit, round(tokens))), correct and tokens <= work.limit))
        return tuple(drawn)

    return SimulatedGroup(work.prompt_tokens, wave(rate), wave(rate + work.purified_gain * (1 - rate)))


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    parameters: float
    kv_bytes_per_token: int
    """2 x layers x key-value heads x head size x 2 bytes (bfloat16)."""


MODELS = (Model("Qwen2.5-3B", 3.09e9, 2 * 36 * 2 * 128 * 2), Model("Qwen2.5-7B", 7.62e9, 2 * 28 * 4 * 128 * 2))
BANDWIDTH_SHARE, ARITHMETIC_SHARE, FIXED_S, TRAINING_SHARE = 0.7, 0.5, 0.003, 0.4
"""The shares of the data sheet's memory bandwidth and arithmetic that decoding reaches, the host's seconds per step,
and the share of arithmetic that training reaches."""
GRADING_S = 0.05


def a800(model: Model) -> Cost:
    """The cost on one GPU. Weights are read once per step; arithmetic is 2 operations per parameter and token."""
    gpu = GPUS["A800-80GB"]
    bytes_per_s, flops = gpu.memory_gb_s * 1e9 * BANDWIDTH_SHARE, gpu.bfloat16_tflops * 1e12 * ARITHMETIC_SHARE
    per_token = 2 * model.parameters / flops
    return Cost(
        FIXED_S, 2 * model.parameters / bytes_per_s, per_token, model.kv_bytes_per_token / bytes_per_s, per_token
    )


def training_seconds(model: Model, groups: list[SimulatedGroup], gpus: int) -> float:
    """Seconds of forward, backward and reference passes (8 operations per parameter and token) over the first waves.

    They are the same for LENS: its merged groups have about as many tokens; scoring prompts costs under 1 % of it.
    """
    tokens = sum(n + g.prompt_tokens for g in groups for n, _ in g.native)
    return 8 * model.parameters * tokens / (gpus * GPUS["A800-80GB"].bfloat16_tflops * 1e12 * TRAINING_SHARE)
