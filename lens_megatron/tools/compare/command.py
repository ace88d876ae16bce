"""Compares methods from one checkpoint: `lens-compare --fork RUN@STEP --methods A,B --budget steps=K --out DIR`.

Every method goes on from the same checkpoint of a run, with the same seeds as the others. The table of what that shows
is printed and written to DIR/comparison.md and DIR/comparison.json. The same command goes on with an interrupted
comparison, and more methods, seeds or budget may be added. --gradients compares each method's gradient on one batch.
Exit status: 0 done, 1 a crash, 2 it cannot be made as asked, 130 it was stopped and goes on with the same command.
"""

import json
import logging
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lens_megatron.errors import UserError
from lens_megatron.files import why_no_folder, write_atomically
from lens_megatron.output import console
from lens_megatron.output.console import print_text
from lens_megatron.output.metrics import read_metrics
from lens_megatron.output.run_lease import LEASE, LOCK, RunLease
from lens_megatron.tools.compare import gradient_run, processes, table, training
from lens_megatron.tools.compare.arms import Arm, make_arm, progress
from lens_megatron.tools.compare.curves import MethodComparison, compare_methods, read_curve
from lens_megatron.tools.compare.forks import ForkPoint, find_fork
from lens_megatron.tools.compare.methods import ComparedMethod, find_methods
from lens_megatron.tools.compare.request import Budget, CompareError, ComparisonRequest, read_budget

MARKER = "lens_comparison.json"
"""Marks a folder as a comparison's, and names the checkpoint that its arms began from."""
FORMAT = "lens_megatron comparison"
MOST_ARMS = 1000
_HEADROOM = 1.05
"""Metrics, rollouts and logs, which are small beside checkpoints, come on top of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the arms, prints the comparison; returns the exit status."""
    with console.messages_on_console(), processes.stoppable():
        try:
            run(parse(arguments))
        except UserError as error:
            console.report_error(str(error))
            return error.exit_code
        except OSError as error:
            console.report_error(f"{error}; free space or permissions, then start the same command again")
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


def parse(arguments: Sequence[str] | None) -> ComparisonRequest:
    """Reads the command line. Raises SystemExit, CompareError."""
    parser = ArgumentParser(
        prog="lens-compare", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--fork", required=True, metavar="RUN@STEP", help="a run's folder and the step to go on from")
    parser.add_argument(
        "--methods",
        required=True,
        metavar="A,B",
        help="files of configs/methods, YAML files, or own: the run's options",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder for all arms")
    parser.add_argument("--seeds", type=int, default=1, help="the run's own seed and those that follow it (default: 1)")
    parser.add_argument("--budget", metavar="steps=K|tokens=K", help="steps, or sampled tokens, from the fork on")
    parser.add_argument("--baseline", help="a method of --methods (default: grpo if it is there, else the first)")
    parser.add_argument("--gradients", action="store_true", help="compare the methods' gradients on one batch, too")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="P", help="processes of an arm (default: as the checkpoint was saved)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.option=value", help="for all arms, over any method")
    parsed = parser.parse_intermixed_args(arguments)
    for name in ("seeds", "nproc_per_node"):
        value = getattr(parsed, name)
        if value is not None and not 1 <= value <= MOST_ARMS:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number from 1 to {MOST_ARMS}")
    if parsed.budget is None and not parsed.gradients:
        parser.error("give --budget steps=K or tokens=K to train arms, --gradients to compare gradients, or both")
    return ComparisonRequest(
        fork=parsed.fork,
        methods=parsed.methods,
        out=parsed.out,
        seeds=parsed.seeds,
        budget=read_budget(parsed.budget) if parsed.budget is not None else None,
        baseline=parsed.baseline,
        ranks=parsed.nproc_per_node,
        overrides=tuple(parsed.overrides),
        gradients=parsed.gradients,
    )


def run(request: ComparisonRequest) -> None:
    """Makes the comparison. Raises a UserError; whatever can be checked is checked before anything is written."""
    methods, fork, out = find_methods(request.methods), find_fork(request.fork), _folder(request.out)
    baseline = _baseline(request, methods)
    ranks = request.ranks or fork.world_size
    if fork.run in (out, *out.parents):
        raise CompareError(f"--out {out} lies in the run {fork.run}; choose a folder outside it")
    arms = _arms(request, fork, methods, out, ranks)
    plan = gradient_run.plan_gradients(fork, methods, out, request.overrides) if request.gradients else None
    _check_marker(out, fork)
    out.mkdir(parents=True, exist_ok=True)
    lease = RunLease(out)
    try:
        _check_marker(out, fork)
        write_atomically(out / MARKER, json.dumps(_marker(fork), indent=1) + "\n")
        if request.budget is not None:
            _train(arms, fork, request.budget, ranks, out)
            found = _compare(arms, fork, request.budget, methods, baseline)
            _publish(out, fork, request.budget, request, baseline, found)
        if plan is not None:
            print_text(gradient_run.compare_gradients(fork, plan, out))
    finally:
        lease.release()


def _folder(path: Path) -> Path:
    out = path.expanduser().absolute()
    if why := why_no_folder(out):
        raise CompareError(f"--out {out}: {why}; choose another folder")
    return out


def _baseline(request: ComparisonRequest, methods: Sequence[ComparedMethod]) -> str:
    names = [method.name for method in methods]
    if request.baseline is None:
        return "grpo" if "grpo" in names else names[0]
    if request.baseline not in names:
        raise CompareError(f"--baseline {request.baseline} is not among --methods {', '.join(names)}; name one of them")
    return request.baseline


def _arms(
    request: ComparisonRequest, fork: ForkPoint, methods: Sequence[ComparedMethod], out: Path, ranks: int
) -> tuple[Arm, ...]:
    """Returns the arms seed by seed, so that an interrupted comparison has whole pairs."""
    if request.budget is None:
        return ()
    arms = tuple(
        make_arm(fork, method, seed, request.budget, out, request.overrides, ranks)
        for seed in range(request.seeds)
        for method in methods
    )
    if not arms[0].config.data.eval:
        raise CompareError(
            f"{fork}: data.eval is empty, so that there would be no accuracy to compare; give data.eval=[FILE]"
        )
    return arms


def _marker(fork: ForkPoint) -> dict[str, str]:
    return {"format": FORMAT, "fork": str(fork), "checkpoint": fork.identity}


def _check_marker(out: Path, fork: ForkPoint) -> None:
    """Raises CompareError where the folder holds something else than arms of this fork."""
    names = {path.name for path in out.iterdir()} - {LOCK, LEASE} if out.exists() else set()
    if not names:
        return
    try:
        marker = json.loads((out / MARKER).read_text(errors="replace"))
    except (OSError, ValueError):
        marker = None
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        raise CompareError(f"--out {out} holds files that are no comparison (no {MARKER} of its own); choose another")
    if marker != _marker(fork):
        raise CompareError(
            f"--out {out} holds arms that began from {marker.get('fork')}, this comparison begins from {fork}"
            f"{' with other content' if marker.get('fork') == str(fork) else ''}; choose another folder"
        )


def _train(arms: Sequence[Arm], fork: ForkPoint, budget: Budget, ranks: int, out: Path) -> None:
    for arm in arms:
        training.check_arm(arm, fork, budget)
    _check_disk(arms, fork, budget, out)
    training.train_arms(arms, fork, budget, ranks)


def _check_disk(arms: Sequence[Arm], fork: ForkPoint, budget: Budget, out: Path) -> None:
    """Raises CompareError where the arms' checkpoints would not fit on the disk.

    An arm that is done keeps `train.save_total_limit` checkpoints, and one that trains has one more while it saves.
    """
    missing = [arm for arm in arms if not (arm.folder.exists() and progress(arm, fork, budget).is_done)]
    if not missing:
        return
    kept = sum(arm.config.train.save_total_limit + arm.config.train.save_best_limit for arm in missing)
    needed, free = int((kept + 1) * fork.bytes * _HEADROOM), shutil.disk_usage(out).free
    if needed > free:
        raise CompareError(
            f"--out {out}: the checkpoints of {len(missing)} arms take about {needed / 1e9:.1f} GB, {free / 1e9:.1f} "
            "GB are free; make room, choose another folder, or compare fewer methods or seeds"
        )


def _compare(
    arms: Sequence[Arm], fork: ForkPoint, budget: Budget, methods: Sequence[ComparedMethod], baseline: str
) -> tuple[MethodComparison, ...]:
    curves = [read_curve(arm.method, arm.seed_index, read_metrics(arm.folder), fork.step, budget) for arm in arms]
    return compare_methods(curves, [method.name for method in methods], baseline)


def _publish(
    out: Path,
    fork: ForkPoint,
    budget: Budget,
    request: ComparisonRequest,
    baseline: str,
    found: Sequence[MethodComparison],
) -> None:
    text = table.render(str(fork), budget, baseline, found, request.seeds)
    content = {
        "fork": str(fork),
        "budget": str(budget),
        "baseline": baseline,
        "seeds": [fork.seed + index for index in range(request.seeds)],
        "overrides": request.overrides,
        "methods": [asdict(method) for method in found],
    }
    write_atomically(out / "comparison.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / "comparison.md", text)
    print_text(text)
    logging.getLogger(__name__).info(f"written to {out / 'comparison.md'} and {out / 'comparison.json'}")
