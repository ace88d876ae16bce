"""Samples and grades what an evaluation lacks: engine and graders work at the same time.

tasks without a sample -> queue -> engine -> text, cut at stop texts -> extractor -> graders -> journal
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.evaluation.journal import EvalSample
from lens_megatron.evaluation.prompting import EvalTask, cut_at_stop
from lens_megatron.evaluation.protocols import EvalProtocol
from lens_megatron.reward import GraderPool
from lens_megatron.reward.extractors import find_extractor, in_box
from lens_megatron.reward.types import AnswerFacts, Grade
from lens_megatron.rollout.engine import Completion, RolloutEngine
from lens_megatron.rollout.queue import OwnQueue


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as text, and what the graders get of it."""

    text: str
    """Without special tokens, up to a stop text."""
    graded: str
    """The completion itself if the extractor reads boxes, as graders do; else the answer in a box; empty for none."""
    finished: bool
    """True where the model or a stop text ended it."""


def read_answer_of(completion: Completion, tokenizer: Tokenizer, protocol: EvalProtocol) -> Answer:
    """Decodes a completion as the protocol says."""
    text, stopped = cut_at_stop(tokenizer.decode(completion.token_ids), protocol.stop)
    return Answer(text, for_graders(text, protocol.extractor), completion.finished or stopped)


def for_graders(text: str, extractor: str) -> str:
    """Returns what the graders get of a completion's text: what the named extractor finds, in a box."""
    if extractor == "boxed":
        return text
    found = find_extractor(extractor)(text)
    return "" if found is None else in_box(found)


@dataclass(frozen=True, slots=True)
class _Open:
    """A sample that is under way."""

    task: EvalTask
    sample: int


def sample_missing(
    engine: RolloutEngine,
    graders: GraderPool,
    tokenizer: Tokenizer,
    protocol: EvalProtocol,
    tasks: Sequence[EvalTask],
    done: Collection[tuple[str, str, int]],
    seed: int,
    *,
    certainty: bool = False,
) -> Iterator[list[EvalSample]]:
    """Yields graded samples as they are known, until every task has all of its samples.

    Args:
        engine: awake, with weights.
        done: keys of samples that exist already.
        seed: the evaluation's.
        certainty: ask the engine for self-certainties.
    """
    queue = OwnQueue(engine)
    wanted = [_Open(task, sample) for task in tasks for sample in range(task.samples)]
    under_way = {
        number: each
        for number, each in enumerate(wanted)
        if (each.task.prompt.source, each.task.problem_id, each.sample) not in done
    }
    requests = [each.task.request(number, each.sample, seed, certainty=certainty) for number, each in under_way.items()]
    queue.add(requests, urgent=False, expected_length=0.0)
    tickets: dict[int, tuple[_Open, Completion, Answer]] = {}
    with engine.phase():
        while under_way:
            for completion in queue.step():
                each, answer = under_way.pop(completion.request_id), read_answer_of(completion, tokenizer, protocol)
                prompt = each.task.prompt
                facts = AnswerFacts(prompt.source, prompt.record, completion.token_ids if prompt.record else ())
                tickets[graders.submit(answer.graded, prompt.answer, facts=facts)] = each, completion, answer
            if graded := [_graded(*tickets.pop(ticket), grade) for ticket, grade in graders.poll()]:
                yield graded
    if tickets:
        yield [_graded(*tickets[ticket], grade) for ticket, grade in graders.wait(list(tickets)).items()]


def _graded(each: _Open, completion: Completion, answer: Answer, grade: Grade) -> EvalSample:
    return EvalSample(
        benchmark=each.task.prompt.source,
        problem=each.task.problem_id,
        sample=each.sample,
        status=grade.status,
        extracted=grade.extracted,
        tokens=len(completion.token_ids),
        finished=answer.finished,
        certainty=completion.certainty,
        detail=grade.detail,
        text=answer.text,
    )
