"""`lens-eval compare A B`: the paired comparison of two evaluations of the same problems."""

import logging
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

from lens_megatron.evaluation.benchmarks import PAPER, in_paper_order, title_of
from lens_megatron.evaluation.journal import EvaluationFolderError, EvaluationIdentity, read_identity
from lens_megatron.evaluation.statistics import Difference, paired
from lens_megatron.evaluation.summary import ProblemResult
from lens_megatron.evaluation.tables import read_problem_results
from lens_megatron.seeds import derive

logger = logging.getLogger(__name__)

Results = Mapping[str, tuple[ProblemResult, ...]]


def main(words: Sequence[str]) -> int:
    """Prints the comparison of two folders. Raises EvaluationFolderError where they cannot be compared."""
    parser = ArgumentParser(prog="lens-eval compare", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="the folder of an evaluation")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: 0)")
    parsed = parser.parse_args(words)
    identities = _identity(parsed.first), _identity(parsed.second)
    if identities[0].protocol_hash != identities[1].protocol_hash:
        logger.warning(
            f"{parsed.first} has the protocol {identities[0].protocol} {identities[0].protocol_hash}, {parsed.second} "
            f"{identities[1].protocol} {identities[1].protocol_hash}: the difference is that of both"
        )
    results = read_problem_results(parsed.first), read_problem_results(parsed.second)
    print(compare(results, identities, (str(parsed.first), str(parsed.second)), parsed.seed))
    return 0


def _identity(folder: Path) -> EvaluationIdentity:
    found = read_identity(folder)
    if found is None:
        raise EvaluationFolderError(f"{folder}: no evaluation there; give the folder that lens-eval --out has written")
    return found


def compare(
    results: tuple[Results, Results],
    identities: tuple[EvaluationIdentity, EvaluationIdentity],
    names: tuple[str, str],
    seed: int,
) -> str:
    """Returns a Markdown table: both accuracies, their difference A - B with its interval, and the p-value.

    Raises EvaluationFolderError where no benchmark is in both, or one has other problems.
    """
    shared = in_paper_order([name for name in results[0] if name in results[1]])
    if not shared:
        raise EvaluationFolderError(
            f"{names[0]} has {', '.join(results[0]) or 'nothing'}, {names[1]} {', '.join(results[1]) or 'nothing'}; "
            "evaluate both on the same benchmarks"
        )
    digests = dict(identities[0].digests), dict(identities[1].digests)
    scores = {}
    for name in shared:
        if digests[0].get(name) != digests[1].get(name):
            raise EvaluationFolderError(
                f"{name}: {names[0]} has data {digests[0].get(name)}, {names[1]} {digests[1].get(name)}; evaluate both "
                "on the same file" + " and with one --seed" * (name == "generated")
            )
        scores[name] = _shared_scores(results[0][name], results[1][name])
        if not scores[name][0]:
            raise EvaluationFolderError(f"{name}: {names[0]} and {names[1]} have no problem in common")
    lines = [f"A: {names[0]} ({identities[0].model})", f"B: {names[1]} ({identities[1].model})", ""]
    lines += ["| | problems | A | B | A - B | interval | p |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name in shared:
        lines.append(_line(title_of(name), [scores[name]], derive(seed, "compare", name)))
    paper = {benchmark.name for benchmark in PAPER}
    own = [scores[name] for name in shared if name in paper]
    if len(own) > 1:
        lines.append(_line("Average", own, derive(seed, "compare")))
    return "\n".join([*lines, "", "Percent; 95 % bootstrap interval over problems; p of a paired permutation test."])


def _shared_scores(first: Sequence[ProblemResult], second: Sequence[ProblemResult]) -> tuple[list[float], list[float]]:
    """Returns the scores of the problems that both have: `--limit` may have left one of them fewer."""
    theirs = {problem.id: problem.score for problem in second}
    both = [problem for problem in first if problem.id in theirs]
    return [problem.score for problem in both], [theirs[problem.id] for problem in both]


def _line(title: str, parts: Sequence[tuple[list[float], list[float]]], seed: int) -> str:
    found: Difference = paired(parts, seed)
    means = [sum(sum(part[side]) / len(part[side]) for part in parts) / len(parts) for side in (0, 1)]
    problems = sum(len(part[0]) for part in parts)
    interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return (
        f"| {title} | {problems} | {100 * means[0]:.1f} | {100 * means[1]:.1f} | {100 * found.mean:+.1f} | "
        f"{interval} | {found.p_value:.4f} |"
    )
