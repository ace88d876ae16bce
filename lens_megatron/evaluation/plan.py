"""Plans the evaluations of a training run: which problems are asked, how, and whether training has seen them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lens_megatron.config import Config
from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.evaluation.benchmarks import EvalProblem, canonical_name, read_problems
from lens_megatron.evaluation.overlap import find_overlaps, summary_lines
from lens_megatron.evaluation.prompting import EvalTask, make_tasks
from lens_megatron.evaluation.protocols import EvalProtocol, describe, load_protocol
from lens_megatron.types import Prompt

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 50_000_000
"""Training data beyond this is not searched for benchmarks before a run: it would take more than half a minute."""


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """What every evaluation of a run does."""

    protocol: EvalProtocol
    tasks: tuple[EvalTask, ...]
    """Of all ranks together. Those of one source have equally many samples."""


def plan_as_in_training(config: Config, prompts: Sequence[Prompt]) -> EvalPlan:
    """Returns the plan without `train.eval_protocol`: prompts and lengths are those of training."""
    # Not validated again: an option may be colder than what a protocol may be, as not every engine samples so cold.
    protocol = EvalProtocol.model_construct(
        name="training",
        instruction=config.data.instruction,
        system_prompt=config.data.system_prompt,
        temperature=config.train.eval_temperature,
        max_tokens=config.rollout.max_response_length,
        samples=config.train.eval_samples,
    )
    tasks = (
        EvalTask(
            problem_id=str(prompt.index),
            prompt=prompt,
            max_new_tokens=protocol.max_tokens,
            samples=protocol.samples,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            top_k=protocol.top_k,
            stop=(),
        )
        for prompt in prompts
    )
    return EvalPlan(protocol, tuple(tasks))


def plan_by_protocol(config: Config, tokenizer: Tokenizer, context: int) -> EvalPlan:
    """Returns the plan that `train.eval_protocol` names. A source is called after its file, as a benchmark is.

    Args:
        context: the tokens of prompt and completion together that the engine takes.

    Raises ConfigError for an unknown protocol, DataError for data that cannot be used.
    """
    protocol = load_protocol(config.train.eval_protocol or "")
    logger.info(f"evaluations: {describe(protocol)}")
    tasks: list[EvalTask] = []
    for source in config.data.eval:
        stem = Path(source).stem if source.endswith((".jsonl", ".parquet")) else source
        problems = read_problems(canonical_name(stem), source, data=config.data)
        tasks += make_tasks(problems, protocol, tokenizer, context)
    cut = [task for task in tasks if task.max_new_tokens < protocol.max_tokens]
    if cut:
        logger.warning(
            f"evaluations: {len(cut)} of {len(tasks)} problems get fewer than the protocol's {protocol.max_tokens} "
            f"tokens, {min(task.max_new_tokens for task in cut)} at least: the engine's context is {context}"
        )
    return EvalPlan(protocol, tuple(tasks))


def warn_of_overlap(training: Sequence[Prompt], tasks: Sequence[EvalTask], source: str) -> None:
    """Logs a warning for each evaluation set of which the training prompts hold problems."""
    if not tasks:
        return
    size = sum(len(prompt.problem) for prompt in training)
    if size > MOST_CHARACTERS:
        logger.info(
            f"{source}: {size:,} characters are too many to search for evaluation problems before a run; use "
            "lens-eval overlap"
        )
        return
    problems = [
        EvalProblem(t.prompt.source, t.problem_id, t.prompt.index, t.prompt.problem, t.prompt.answer, "", "", "")
        for t in tasks
    ]
    found = find_overlaps((prompt.problem for prompt in training), problems)
    for line in summary_lines(found, problems, source):
        logger.warning(f"{line}; an accuracy on them is not one on unseen problems")
