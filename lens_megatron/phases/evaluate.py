"""Measures the accuracy on held-out prompts: every rank's engine samples, and rollouts are graded as in training.

`reward.rules` take no part: an accuracy is that of the graders, with `reward.success_threshold` if there is one. What
is asked and how it is sampled is the protocol's (`train.eval_protocol`); the statistics are those of lens-eval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lens_megatron.evaluation.prompting import EvalTask
from lens_megatron.evaluation.sampling import Answer, read_answer_of
from lens_megatron.evaluation.statistics import Estimate, estimate, majority, pass_at
from lens_megatron.evaluation.voting import CORRECT, GradedAnswer, group_answers
from lens_megatron.phases import engine_turn
from lens_megatron.results import SyncStats
from lens_megatron.reward.types import Grade, GradeStatus
from lens_megatron.rollout.queue import open_queue
from lens_megatron.rollout.rewarding import answer_facts
from lens_megatron.run import Run
from lens_megatron.seeds import derive


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The accuracy on the prompts of a data source, over all ranks. Shares are of all samples."""

    source: str
    prompts: int
    samples: int
    """Of every prompt."""
    correct: Estimate
    """The mean over prompts of the share of correct samples, with its bootstrap uncertainty over prompts."""
    pass_at: float
    """pass@samples: the share of prompts with any correct sample."""
    majority: float | None
    """maj@samples; None with one sample, or where other graders than math_verify decide."""
    truncated: float
    unparsed: float
    grading_failed: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of an evaluation, and the transfer of weights before it."""

    accuracies: tuple[Accuracy, ...]
    """The accuracy on each data source, in the order of their names."""
    sync: SyncStats | None
    """The transfer of weights; None where the engine had the policy's weights already."""


@dataclass(frozen=True, slots=True)
class _Graded:
    """A sample of the task at `place`."""

    place: int
    answer: Answer
    grade: Grade


_COLUMNS = ("correct", "majority", "truncated", "unparsed", "failed")


def evaluate(run: Run) -> Evaluation:
    """Returns the policy's accuracy on all evaluation prompts of all ranks. A collective.

    Seeds are the same every time, so that evaluations differ only because the weights do.
    """
    tasks, group = run.eval_plan.tasks, run.engine_group
    own = range(group.number, len(tasks), group.engines) if group.leads else range(0)
    table = torch.zeros(len(tasks), len(_COLUMNS), dtype=torch.float64, device=run.mesh.device)
    counts, sync = engine_turn.let_engine_sample(run, partial(_counts, run, own))
    for place, row in zip(own, counts, strict=True):
        table[place] = torch.tensor(row, dtype=torch.float64)
    torch.distributed.all_reduce(table)
    table, votes = table.cpu(), _votes(run)
    sources = [task.prompt.source for task in tasks]
    parts = {name: [place for place, source in enumerate(sources) if source == name] for name in sorted(set(sources))}
    return Evaluation(
        tuple(
            _accuracy(name, table[places], tasks[places[0]].samples, run.config.run.seed, votes=votes)
            for name, places in parts.items()
        ),
        sync,
    )


def _votes(run: Run) -> bool:
    """Whether answers can be compared with each other: a grader of the user's may grade anything."""
    return run.graders.graders.only_math_verify


def _accuracy(source: str, table: Tensor, samples: int, run_seed: int, *, votes: bool) -> Accuracy:
    """Returns the accuracy of the prompts whose counts are the rows of `table`, [prompts, len(_COLUMNS)]."""
    correct, majorities, truncated, unparsed, failed = table.T
    total = samples * len(table)
    return Accuracy(
        source=source,
        prompts=len(table),
        samples=samples,
        correct=estimate((correct / samples).tolist(), derive(run_seed, "bootstrap", source)),
        pass_at=float(pass_at([int(count) for count in correct.tolist()], samples)[:, -1].mean()),
        majority=float(majorities.mean()) if votes and samples > 1 else None,
        truncated=float(truncated.sum()) / total,
        unparsed=float(unparsed.sum()) / total,
        grading_failed=float(failed.sum()) / total,
    )


def _counts(run: Run, own: Sequence[int]) -> list[tuple[float, ...]]:
    """Returns each own task's `_COLUMNS`. Ranks without tasks join, as their engines may serve others."""
    tasks = [run.eval_plan.tasks[place] for place in own]
    with run.engine.phase():
        tickets = _sample_and_submit(run, tasks)
    graded: list[list[_Graded]] = [[] for _ in tasks]
    for ticket, grade in run.graders.wait(list(tickets)).items():
        place, answer = tickets[ticket]
        graded[place].append(_Graded(place, answer, grade.judged(run.config.reward.success_threshold)))
    several = _votes(run) and any(task.samples > 1 for task in tasks)
    answers = [[GradedAnswer(each.grade.status, each.grade.extracted) for each in samples] for samples in graded]
    groups = group_answers(run.graders, answers) if several else [() for _ in tasks]
    return [_row(samples, votes) for samples, votes in zip(graded, groups, strict=True)]


def _row(samples: Sequence[_Graded], groups: Sequence[int]) -> tuple[float, ...]:
    statuses = [each.grade.status for each in samples]
    return (
        sum(each.grade.correct for each in samples),
        majority([1.0] * len(groups), groups, CORRECT),
        sum(not each.answer.finished for each in samples),
        statuses.count(GradeStatus.UNPARSED),
        sum(each.grade.failed for each in samples),
    )


def _sample_and_submit(run: Run, tasks: Sequence[EvalTask]) -> dict[int, tuple[int, Answer]]:
    """Samples every task and submits the answers to the graders; returns each ticket's place in `tasks`."""
    queue = open_queue(run.engine, run.scheduler.request_store)
    places: dict[int, int] = {}
    for place, task in enumerate(tasks):
        first = queue.first_id + len(places) * queue.id_step
        requests = [task.request(first + n * queue.id_step, n, run.config.run.seed) for n in range(task.samples)]
        places |= {request.request_id: place for request in requests}
        queue.add(requests, urgent=False, expected_length=0.0)
    tickets: dict[int, tuple[int, Answer]] = {}
    while len(tickets) < len(places):
        for completion in queue.step():
            place = places[completion.request_id]
            prompt, answer = tasks[place].prompt, read_answer_of(completion, run.tokenizer, run.eval_plan.protocol)
            ticket = run.graders.submit(answer.graded, prompt.answer, facts=answer_facts(prompt, completion))
            tickets[ticket] = place, answer
    queue.finish()
    return tickets
