"""Makes what an engine is asked of problems and a protocol: token ids, lengths, stop tokens, seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from lens_megatron.data.datasets import DataError, Message
from lens_megatron.data.prompts import render_chat
from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.evaluation.benchmarks import EvalProblem
from lens_megatron.evaluation.protocols import CHAT, PROBLEM, EvalProtocol
from lens_megatron.rollout.engine import Request
from lens_megatron.seeds import derive
from lens_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class EvalTask:
    """A problem as an engine gets it."""

    problem_id: str
    prompt: Prompt
    """Nothing of it is eligible. Its source is the benchmark."""
    max_new_tokens: int
    """The protocol's, or as many as fit the model's context, if those are fewer."""
    samples: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[int, ...]
    """Token ids that end a completion besides the model's own."""

    def request(self, request_id: int, sample: int, run_seed: int, *, certainty: bool = False) -> Request:
        """Returns the request for one completion. Its seed depends on benchmark, problem and sample alone."""
        seed = derive(run_seed, "evaluate", self.prompt.source, self.problem_id, sample)
        return Request(
            request_id=request_id,
            prompt=self.prompt.token_ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            certainty=certainty,
        )


def make_tasks(
    problems: Sequence[EvalProblem], protocol: EvalProtocol, tokenizer: Tokenizer, context: int
) -> tuple[EvalTask, ...]:
    """Renders and tokenizes problems.

    Args:
        context: the tokens of prompt and completion together that the engine can take.

    Raises DataError for a prompt that leaves no room for an answer.
    """
    stop = stop_tokens(protocol, tokenizer)
    return tuple(_task(problem, protocol, tokenizer, context, stop) for problem in problems)


def _task(
    problem: EvalProblem, protocol: EvalProtocol, tokenizer: Tokenizer, context: int, stop: tuple[int, ...]
) -> EvalTask:
    ids = prompt_ids(problem, protocol, tokenizer)
    room = context - len(ids)
    if room < 1:
        raise DataError(
            f"{problem.benchmark}: problem {problem.id} has {len(ids)} tokens with its template, the model's context "
            f"is {context}; leave the problem out, or take a model with a longer context"
        )
    prompt = Prompt(
        index=problem.index,
        token_ids=ids,
        eligible=(False,) * len(ids),
        answer=problem.answer,
        problem=problem.problem,
        source=problem.benchmark,
        record=problem.record,
    )
    return EvalTask(
        problem_id=problem.id,
        prompt=prompt,
        max_new_tokens=min(protocol.max_tokens, room),
        samples=protocol.samples_for(problem.benchmark),
        temperature=protocol.temperature,
        top_p=protocol.top_p,
        top_k=protocol.top_k,
        stop=stop,
    )


def prompt_text(problem: EvalProblem, protocol: EvalProtocol, tokenizer: Tokenizer) -> str:
    """Returns the text that the model reads, without what its tokenizer adds."""
    user = problem.problem
    if protocol.instruction.strip() and protocol.instruction.strip() not in user:
        user = f"{user}\n{protocol.instruction}"
    if protocol.template != CHAT:
        return protocol.template.replace(PROBLEM, user)
    system = [Message("system", protocol.system_prompt)] if protocol.system_prompt else []
    return render_chat(tokenizer.hf, [*system, Message("user", user)], f"{problem.benchmark}: problem {problem.id}")


def prompt_ids(problem: EvalProblem, protocol: EvalProtocol, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the token ids that the model reads.

    A chat template writes its own beginning-of-sequence token; to plain text the tokenizer adds it, if it does so.
    """
    by_template = protocol.template == CHAT and bool(tokenizer.hf.chat_template)
    text = prompt_text(problem, protocol, tokenizer)
    return tuple(tokenizer.hf(text, add_special_tokens=not by_template, verbose=False)["input_ids"])


def stop_tokens(protocol: EvalProtocol, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids of the stop texts that are single tokens, ascending."""
    encoded = [tokenizer.hf.encode(text, add_special_tokens=False) for text in protocol.stop]
    return tuple(sorted({ids[0] for ids in encoded if len(ids) == 1}))


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the first stop text, and whether there is one."""
    places = [place for place in (text.find(word) for word in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
