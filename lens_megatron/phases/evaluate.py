"""Measures the accuracy on held-out prompts: every rank's engine samples, and rollouts are graded as in training.

`reward.rules` take no part: an accuracy is that of the graders, with `reward.success_threshold` if there is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lens_megatron.phases import engine_turn
from lens_megatron.results import SyncStats
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.queue import open_queue
from lens_megatron.rollout.rewarding import answer_facts
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The accuracy on the prompts of a data source."""

    source: str
    correct: float
    """The sum over prompts of the share of correct samples."""
    prompts: int
    """The number of prompts of all ranks."""

    @property
    def mean(self) -> float:
        return self.correct / self.prompts

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over prompts, from the binomial bound."""
        return math.sqrt(max(0.0, self.mean * (1 - self.mean)) / self.prompts)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of an evaluation, and the transfer of weights before it."""

    accuracies: tuple[Accuracy, ...]
    """The accuracy on each data source, in the order of their names."""
    sync: SyncStats | None
    """The transfer of weights; None where the engine had the policy's weights already."""


def evaluate(run: Run) -> Evaluation:
    """Returns the policy's accuracy on all evaluation prompts of all ranks. A collective.

    Seeds are the same every time, so that evaluations differ only because the weights do.
    """
    sources = sorted({p.source for p in run.eval_prompts})
    own = run.eval_prompts[run.engine_group.number :: run.engine_group.engines] if run.engine_group.leads else ()
    shares, sync = engine_turn.let_engine_sample(run, partial(_success_shares, run, own))
    table = torch.zeros(len(sources), 2, dtype=torch.float64, device=run.mesh.device)
    for prompt, share in zip(own, shares, strict=True):
        table[sources.index(prompt.source)] += torch.tensor([share, 1.0], dtype=torch.float64, device=table.device)
    torch.distributed.all_reduce(table)
    rows = zip(sources, table.tolist(), strict=True)
    return Evaluation(tuple(Accuracy(source, correct, int(count)) for source, (correct, count) in rows), sync)


def _success_shares(run: Run, prompts: Sequence[Prompt]) -> list[float]:
    """Returns each prompt's share of correct samples. Ranks without prompts join, as their engines may serve others."""
    with run.engine.phase():
        tickets = _sample_and_submit(run, prompts)
    correct = [0] * len(prompts)
    for ticket, grade in run.graders.wait(list(tickets)).items():
        correct[tickets[ticket]] += grade.judged(run.config.reward.success_threshold).correct
    return [count / run.config.train.eval_samples for count in correct]


def _sample_and_submit(run: Run, prompts: Sequence[Prompt]) -> dict[int, int]:
    """Samples every prompt and submits the completions to the graders; returns each ticket's place in `prompts`."""
    config, samples = run.config, run.config.train.eval_samples
    queue = open_queue(run.engine, run.scheduler.request_store)
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
            facts = answer_facts(prompts[place], completion)
            tickets[run.graders.submit(text, prompts[place].answer, facts=facts)] = place
    queue.finish()
    return tickets
