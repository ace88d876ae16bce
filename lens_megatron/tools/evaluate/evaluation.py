"""`lens-eval --model DIR --benchmarks ...`: samples what a folder lacks, grades it, and writes results and a table."""

import importlib.metadata
import logging
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import lens_megatron
from lens_megatron.config import ConfigError
from lens_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lens_megatron.evaluation import generated
from lens_megatron.evaluation.benchmarks import (
    DataPlaces,
    EvalProblem,
    canonical_name,
    digest,
    in_paper_order,
    read_problems,
)
from lens_megatron.evaluation.journal import EvalSample, EvaluationIdentity, Journal, open_journal
from lens_megatron.evaluation.prompting import EvalTask, make_tasks
from lens_megatron.evaluation.protocols import NAMED, EvalProtocol, describe, load_protocol
from lens_megatron.evaluation.sampling import sample_missing
from lens_megatron.evaluation.summary import EvaluationResult, combine, problem_results, summarise
from lens_megatron.evaluation.tables import RESULTS, TABLE, table, to_json
from lens_megatron.files import write_atomically
from lens_megatron.reward import GraderPool
from lens_megatron.tools.evaluate.engines import (
    EngineChoice,
    check_model_folder,
    default_dtype,
    default_engine,
    engine_of,
    fingerprint,
)

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Evaluates a model: lens-eval --model DIR --benchmarks math500,aime24 --data DIR, and its companions.

    lens-eval --model DIR --benchmarks NAME,...   samples, grades, and writes results.json and table.md
    lens-eval compare A B                         compares two evaluations problem by problem
    lens-eval regrade FILE ...                    grades the sample logs of lm-eval-harness or lighteval again
    lens-eval overlap --train FILE --benchmarks   looks for training problems that stand in benchmarks
    lens-eval protocols                           lists the named protocols with their hashes

docs/EVALUATION.md describes protocols, data and statistics. Exit status: 0 done, 2 something cannot be used as it
stands, 130 interrupted (the same command goes on).
"""

GENERATED = 96
"""Problems of the generated set: eight rounds of its twelve kinds, or 32 of each level."""


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What the user has typed."""

    model: str
    benchmarks: tuple[str, ...]
    protocol: EvalProtocol
    places: DataPlaces
    engine: str
    dtype: str
    out: Path
    limit: int | None
    generated: int
    seed: int
    grader: tuple[str, ...]
    timeout_s: float
    workers: int
    max_running_sequences: int
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True)
class _Set:
    """A benchmark's problems as they are evaluated."""

    name: str
    problems: tuple[EvalProblem, ...]
    digest: str
    """Of all problems of the data, whatever `--limit` leaves of them."""


def main(words: Sequence[str]) -> int:
    """Evaluates as `words` say. Raises a UserError, where possible before anything is written."""
    options = read_options(words)
    folder, result = evaluate(options)
    print((folder / TABLE).read_text(encoding="utf-8"))
    print(f"{sum(len(b.problems) for b in result.benchmarks)} problems; results in {folder / RESULTS}")
    return 0


def read_options(words: Sequence[str]) -> EvaluationOptions:
    """Reads the command line. Raises SystemExit with status 2, or a UserError."""
    parser = _parser()
    parsed = parser.parse_args(words)
    for name in ("samples", "limit", "max_running_sequences", "workers"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: give at least 1")
    protocol = load_protocol(parsed.protocol)
    if parsed.samples:
        protocol = protocol.with_samples(parsed.samples)
    names = dict.fromkeys(canonical_name(name.strip()) for name in parsed.benchmarks.split(",") if name.strip())
    if generated.NAME in names:
        del names[generated.NAME]
    if not names and not parsed.generated:
        parser.error("--benchmarks names none; give some, or --generated N")
    stem = f"{Path(parsed.model).resolve().name}-{protocol.name}-{protocol.hash}"
    return EvaluationOptions(
        model=parsed.model,
        benchmarks=tuple(in_paper_order(list(names))),
        protocol=protocol,
        places=DataPlaces.parse(parsed.data),
        engine=parsed.engine or default_engine(),
        dtype=parsed.dtype or default_dtype(),
        out=Path(parsed.out).expanduser() if parsed.out else Path("evaluations") / stem,
        limit=parsed.limit,
        generated=max(0, parsed.generated),
        seed=parsed.seed,
        grader=tuple(parsed.grader.split(",")),
        timeout_s=parsed.timeout,
        workers=parsed.workers,
        max_running_sequences=parsed.max_running_sequences or (256 if default_engine() == "vllm" else 16),
        gpu_memory_utilization=parsed.gpu_memory_utilization,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="lens-eval", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face model directory; a checkpoint's hf/ is one")
    add("--benchmarks", default="", metavar="NAME,...", help="math500, amc23, aime24, aime25, gaokao2023en, minerva, "
        "olympiadbench, or names given by --data")  # fmt: skip
    add("--protocol", default="lens-paper", help=f"{', '.join(NAMED)}, or a YAML file (default: lens-paper)")
    add("--data", action="append", default=[], metavar="DIR|NAME=FILE", help="a folder with NAME.jsonl or .parquet, or "
        "one benchmark's file or hub dataset; may be repeated")  # fmt: skip
    add("--engine", choices=("vllm", "local"), help="default: vllm on a GPU, else local (transformers)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    add("--samples", type=int, metavar="K", help="completions of every problem; this makes another protocol")
    add("--out", metavar="DIR", help="default: evaluations/MODEL-PROTOCOL-HASH; a folder with samples is gone on with")
    add("--limit", type=int, metavar="N", help="the first N problems of each benchmark only")
    add("--generated", type=int, default=GENERATED, metavar="N", help="problems that no model has seen, beside the "
        f"benchmarks; 0 for none (default: {GENERATED})")  # fmt: skip
    add("--seed", type=int, default=0, help="decides sampling, intervals and the generated problems (default: 0)")
    add("--grader", default="math_verify", help="as reward.grader; several with commas (default: math_verify)")
    add("--timeout", type=float, default=5.0, metavar="S", help="seconds for grading one answer (default: 5)")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="grading processes")
    add("--max-running-sequences", type=int, metavar="N", help="sequences decoded at once (256 on a GPU, else 16)")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="vLLM's share of the GPU")
    return parser


def evaluate(options: EvaluationOptions) -> tuple[Path, EvaluationResult]:
    """Evaluates, or goes on with an evaluation; returns its folder and its results."""
    hf_config = check_model_folder(options.model)
    tokenizer = load_tokenizer(options.model, hf_config.vocab_size)
    logger.info(describe(options.protocol))
    sets = _read_sets(options)
    tasks = _make_tasks(sets, options, tokenizer, hf_config.max_position_embeddings)
    try:
        graders = GraderPool(options.workers, options.timeout_s, options.grader)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with graders, open_journal(options.out, _identity(options, sets)) as journal:
        graders.wait_ready()
        missing = sum(task.samples for task in tasks) - _present(tasks, journal)
        if missing:
            logger.info(f"{missing} samples to draw with {options.engine}, {len(journal.samples)} are in {options.out}")
            with engine_of(_choice(options, tasks), hf_config) as engine:
                certainty = options.engine == "local" and any(task.samples > 1 for task in tasks)
                bar = tqdm(total=missing, desc="Samples", unit=" samples", disable=None)
                new = sample_missing(
                    engine,
                    graders,
                    tokenizer,
                    options.protocol,
                    tasks,
                    journal.samples.keys(),
                    options.seed,
                    certainty=certainty,
                )
                for samples in new:
                    journal.append(samples)
                    bar.update(len(samples))
                bar.close()
        return options.out, _write_results(options, sets, journal.samples, graders)


def _read_sets(options: EvaluationOptions) -> list[_Set]:
    found = []
    for name in options.benchmarks:
        source = options.places.find(name)
        problems = read_problems(name, source)
        chosen = problems[: options.limit]
        logger.info(f"{name}: {len(chosen)} of {len(problems)} problems of {source}")
        found.append(_Set(name, chosen, digest(problems)))
    if options.generated:
        problems = generated.generate(options.seed, options.generated)
        found.append(_Set(generated.NAME, problems[: options.limit], f"seed {options.seed}"))
    return found


def _make_tasks(
    sets: Sequence[_Set], options: EvaluationOptions, tokenizer: Tokenizer, context: int
) -> tuple[EvalTask, ...]:
    tasks = tuple(t for each in sets for t in make_tasks(each.problems, options.protocol, tokenizer, context))
    cut = [task for task in tasks if task.max_new_tokens < options.protocol.max_tokens]
    if cut:
        logger.warning(
            f"{len(cut)} of {len(tasks)} problems get fewer than the protocol's {options.protocol.max_tokens} tokens, "
            f"{min(task.max_new_tokens for task in cut)} at least: the model's context is {context}"
        )
    return tasks


def _present(tasks: Sequence[EvalTask], journal: Journal) -> int:
    keys = ((task.prompt.source, task.problem_id, number) for task in tasks for number in range(task.samples))
    return sum(key in journal.samples for key in keys)


def _identity(options: EvaluationOptions, sets: Sequence[_Set]) -> EvaluationIdentity:
    return EvaluationIdentity(
        protocol=options.protocol.name,
        protocol_hash=options.protocol.hash,
        settings=options.protocol.canonical(),
        model=options.model,
        fingerprint=fingerprint(options.model),
        engine=options.engine,
        dtype=options.dtype,
        grader=",".join(options.grader),
        seed=options.seed,
        digests=tuple(sorted((each.name, each.digest) for each in sets)),
    )


def _choice(options: EvaluationOptions, tasks: Sequence[EvalTask]) -> EngineChoice:
    return EngineChoice(
        model=options.model,
        engine=options.engine,
        dtype=options.dtype,
        max_running_sequences=options.max_running_sequences,
        max_prompt_tokens=max(len(task.prompt.token_ids) for task in tasks),
        max_new_tokens=max(task.max_new_tokens for task in tasks),
        gpu_memory_utilization=options.gpu_memory_utilization,
    )


def _write_results(
    options: EvaluationOptions,
    sets: Sequence[_Set],
    samples: Mapping[tuple[str, str, int], EvalSample],
    graders: GraderPool,
) -> EvaluationResult:
    comparing = graders if graders.graders.only_math_verify else None
    results = []
    for each in sets:
        problems = problem_results(each.problems, samples, options.protocol.samples_for(each.name), comparing)
        results.append(summarise(each.name, problems, options.seed))
    result = combine(results, options.seed)
    identity = _identity(options, sets)
    versions = {
        "lens_megatron": lens_megatron.__version__,
        **{name: importlib.metadata.version(name) for name in ("math-verify", "transformers", "torch")},
    }
    notes = [f"Only the first {options.limit} problems of each set."] if options.limit else []
    write_atomically(options.out / RESULTS, to_json(result, identity, versions))
    write_atomically(options.out / TABLE, table(result, identity, notes))
    return result
