"""Accuracy on held-out prompts, sampled by the rollout engine on every rank, graded like training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lens_megatron.phases import engine_turn
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.queue import open_queue
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
    own = run.eval_prompts[run.engine_group.number :: run.engine_group.engines] if run.engine_group.leads else ()
    with engine_turn.engine_awake(run):
        shares = _success_shares(run, own)
    table = torch.zeros(len(sources), 2, dtype=torch.float64, device=run.mesh.device)
    for prompt, share in zip(own, shares, strict=True):
        table[sources.index(prompt.source)] += torch.tensor([share, 1.0], dtype=torch.float64, device=table.device)
    torch.distributed.all_reduce(table)
    return [Accuracy(s, correct, int(count)) for s, (correct, count) in zip(sources, table.tolist(), strict=True)]


def _success_shares(run: Run, prompts: Sequence[Prompt]) -> list[float]:
    """Of every prompt. All ranks take part, those without prompts too: their engines may serve others'."""
    config, samples = run.config, run.config.train.eval_samples
    queue = open_queue(run.engine, run.sampler.request_store)
    places: dict[int, int] = {}
    for place, prompt in enumerate(prompts):
        seeds = [derive(config.run.seed, "evaluate", prompt.source, prompt.index, sample) for sample in range(samples)]
        first = queue.first_id + place * samples * queue.id_step
        requests = [
            Request(
                request_id=first + sample * queue.id_step,
                prompt=prompt.token_ids,
                max_new_tokens=config.rollout.max_response_length,
                temperature=config.train.eval_temperature,
                seed=seed,
            )
            for sample, seed in enumerate(seeds)
        ]
        places |= {request.request_id: place for request in requests}
        queue.add(requests, urgent=False, expected_length=0.0)
    tickets: dict[int, int] = {}
    while len(tickets) < len(places):
        for completion in queue.step():
            text = run.tokenizer.decode(completion.token_ids)
            place = places[completion.request_id]
            tickets[run.graders.submit(text, prompts[place].answer)] = place
    queue.finish()
    correct = [0] * len(prompts)
    for ticket, grade in run.graders.wait(list(tickets)).items():
        correct[tickets[ticket]] += grade.correct
    return [count / samples for count in correct]
