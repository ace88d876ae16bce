"""Accuracy on held-out prompts, sampled by the rollout engine on every rank, graded like training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lens_megatron import handover
from lens_megatron.rollout.engine import Request
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class Accuracy:
    source: str
    correct: float
    """Sum over prompts of the share of correct samples."""
    prompts: int

    @property
    def mean(self) -> float:
        return self.correct / self.prompts

    @property
    def standard_error(self) -> float:
        """Over prompts, by the binomial bound."""
        return math.sqrt(max(0.0, self.mean * (1 - self.mean)) / self.prompts)


def evaluate(run: Run) -> list[Accuracy]:
    """One accuracy per data source, global. A collective. The same seeds every time, so curves are paired."""
    sources = sorted({p.source for p in run.eval_prompts})
    own = run.eval_prompts[run.team.number :: run.team.engines] if run.team.leads else ()
    with handover.engine_awake(run):
        shares = _success_shares(run, own) if own else []
    table = torch.zeros(len(sources), 2, dtype=torch.float64, device=run.mesh.device)
    for prompt, share in zip(own, shares, strict=True):
        table[sources.index(prompt.source)] += torch.tensor([share, 1.0], dtype=torch.float64, device=table.device)
    torch.distributed.all_reduce(table)
    return [Accuracy(s, correct, int(count)) for s, (correct, count) in zip(sources, table.tolist(), strict=True)]


def _success_shares(run: Run, prompts: Sequence[Prompt]) -> list[float]:
    config, samples = run.config, run.config.train.eval_samples
    requests = [
        Request(
            request_id=place * samples + sample,
            prompt=prompt.token_ids,
            max_new_tokens=config.rollout.max_response_length,
            temperature=config.train.eval_temperature,
            seed=derive(config.run.seed, "evaluate", prompt.source, prompt.index, sample),
        )
        for place, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    run.engine.submit(requests)
    tickets: dict[int, int] = {}
    while len(tickets) < len(requests):
        for completion in run.engine.step():
            text = run.tokenizer.decode(completion.token_ids)
            answer = prompts[completion.request_id // samples].answer
            tickets[run.graders.submit(text, answer)] = completion.request_id // samples
    correct = [0] * len(prompts)
    for ticket, grade in run.graders.wait(list(tickets)).items():
        correct[tickets[ticket]] += grade.correct
    return [count / samples for count in correct]
