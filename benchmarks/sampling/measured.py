"""Measures the schedules and GRPO on the local engine, and fits the cost of its steps to what they took."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.sampling.simulator import Cost, Setting, SimulatedGroup, simulate
from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.reward import AnswerFacts, Grade, GradeStatus
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.scheduler import GRADING_STEPS, RolloutScheduler
from lens_megatron.tools.demo.problems import stream
from lens_megatron.tools.demo.tokenizer import train_tokenizer
from lens_megatron.types import Group, Prompt, PurifiedPrompt, StepPrompt

RUNNING = 256
ROLLOUTS, LIMIT, ENDS, PROMPT_TOKENS = 8, 160, 10, 24
POLICIES = {"grpo": "grpo", "sequential": "sequential", "streamed": "early", "speculative": "fill"}


@dataclass(frozen=True, slots=True)
class Size:
    name: str
    hidden: int
    layers: int
    prompts: int
    heads: int = 4


SIZES = (Size("host_bound", 64, 4, 4), Size("arithmetic_bound", 192, 3, 8))
"""Steps that cost about the same whatever runs, as a GPU's do while it reads weights; steps that cost by sequence."""


class Timed(LocalEngine):
    """Writes down [sequences, cells of the cache, prompt tokens computed, CPU seconds] of every step."""

    def step(self) -> list:
        admitted = list(self.waiting)[: self.max_running_sequences - len(self.running)]
        prompt_tokens = sum(len(p) for p in {s.request.prompt for s in admitted})
        before = len(self.running)
        width = self.mask.shape[1] if before else 0
        begin = time.process_time()
        ended = super().step()
        self.log.append([before + len(admitted), before * width, prompt_tokens, time.process_time() - begin])
        return ended


class Coins:
    """Rewards a completion by its hash, at the rate that the prompt has as its answer; a cut one never."""

    def __init__(self):
        self.grades: list[Grade] = []

    def submit(self, completion: str, answer: str, *, facts: AnswerFacts | None = None) -> int:
        draw = int.from_bytes(hashlib.blake2b(completion.encode(), digest_size=8).digest(), "big") / 2**64
        correct = draw < float(answer) and completion.count(",") < LIMIT - 1
        self.grades.append(Grade(GradeStatus.CORRECT if correct else GradeStatus.WRONG, float(correct), 0.0))
        return len(self.grades) - 1

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]:
        return {ticket: self.grades[ticket] for ticket in tickets}


class Nothing:
    """Keeps no groups."""

    def read(self, step: int, prompts: Sequence[StepPrompt], version: int) -> dict[int, Group]:
        return {}

    def append(self, step: int, place: int, group: Group) -> None:
        pass


def make_engine(size: Size, folder: Path) -> Timed:
    """Makes an engine with random weights; lengths are geometric with mean V / ENDS, cut at LIMIT."""
    tokenizer = train_tokenizer(p.problem for p, _ in zip(stream("train", 0, {0: 1}), range(200), strict=False))
    config = Qwen3Config(
        vocab_size=512, hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=2, head_dim=size.hidden // size.heads,
        max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine = Timed(str(folder), max_running_sequences=RUNNING)
    engine.load_weights([(name, p.data) for name, p in model.named_parameters()], 0)
    engine.eos, engine.log = torch.arange(ENDS), []
    return engine


def run(engine: Timed, size: Size, seed: int, policy: str) -> dict:
    """Samples one step and returns its seconds, its groups and the log of its engine."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ENDS, 512, (size.prompts, PROMPT_TOKENS), generator=generator).tolist()
    rates = torch.rand(size.prompts, generator=generator).tolist()
    eligible = (False,) + (True,) * (PROMPT_TOKENS - 1)
    prompts = [
        Prompt(i, tuple(t), eligible, str(r), "p", "bench") for i, (t, r) in enumerate(zip(ids, rates, strict=True))
    ]
    purified = [PurifiedPrompt(p.token_ids[:5] + p.token_ids[6:], (5,), (0.0,) * PROMPT_TOKENS) for p in prompts]
    rollout = RolloutConfig(
        prompts_per_step=size.prompts, rollouts_per_prompt=ROLLOUTS, max_response_length=LIMIT,
        schedule="streamed" if policy == "grpo" else policy, max_running_sequences=RUNNING,
    )  # fmt: skip
    lens = LensConfig(enabled=policy != "grpo")
    engine.log = []
    sampler = RolloutScheduler(engine, Coins(), lambda i: str(list(i)), rollout, lens, seed, Nothing())
    wall, cpu = time.perf_counter(), time.process_time()
    asked = [StepPrompt(place, *row) for place, row in enumerate(zip(prompts, purified, strict=True))]
    collected = sampler.sample(asked, step=1, version=0)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"wall_s": wall, "cpu_s": cpu, "groups": collected.groups, "log": engine.log, "stats": collected.stats}


def fit(log: list[list[float]]) -> Cost:
    """Fits by least squares on [1, sequences, cells, prompt tokens], with no coefficient below zero."""
    table = torch.tensor(log, dtype=torch.float64)
    columns = torch.cat([torch.ones(len(table), 1, dtype=torch.float64), table[:, :3]], 1)
    kept, found = [0, 1, 2, 3], torch.zeros(4, dtype=torch.float64)
    while kept:
        solved = torch.linalg.lstsq(columns[:, kept], table[:, 3:]).solution[:, 0]
        if bool((solved >= 0).all()):
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    fixed, per_sequence, per_cell, per_prompt_token = found.tolist()
    return Cost(fixed, 0.0, per_sequence, per_cell, per_prompt_token, padded=True)


def work_seconds(log: list[list[float]], cost: Cost) -> float:
    """Seconds that the engine's steps cost by the fit. Their number and contents are exact on a busy machine too."""
    parts = (cost.fixed, cost.per_sequence, cost.per_kv_token, cost.per_prompt_token)
    return sum(parts[0] + parts[1] * n + parts[2] * cells + parts[3] * prompt for n, cells, prompt, _ in log)


def predict(groups: list[Group], cost: Cost, policy: str) -> float:
    """Simulates the seconds for the lengths and verdicts that were sampled."""
    waves = [
        [tuple((len(r.token_ids), r.correct) for r in w) for w in (g.native, g.rescue or g.native)] for g in groups
    ]
    simulated = [SimulatedGroup(PROMPT_TOKENS, *w) for w in waves]
    grading = GRADING_STEPS * cost.seconds(1, 32, 32 * 150)
    return simulate(
        simulated, Setting(cost, capacity=RUNNING, fill=RUNNING, grading_s=grading), POLICIES[policy]
    ).seconds
