"""Makes a summary and a picture of a run from its metrics.jsonl alone: `python -m lens_megatron.report runs/demo`."""

import io
import sys
import textwrap
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend must be chosen first)

from lens_megatron.files import write_atomically  # noqa: E402
from lens_megatron.output import conclusion  # noqa: E402
from lens_megatron.output.conclusion import accuracy_names, source_of  # noqa: E402
from lens_megatron.output.console import print_text  # noqa: E402
from lens_megatron.output.metrics import read_metrics  # noqa: E402

PHASES = ("score", "gen", "exchange", "old_log_prob", "ref", "update_actor", "update_weights", "wake", "sleep", "step",
          "testing", "save_checkpoint")  # fmt: skip
_TITLE_WIDTH = 80
"""Number of characters in a line above one half of the picture."""


def write(folder: Path) -> str:
    """Writes summary.txt and learning_curve.png into `folder`; returns the summary and names files not written."""
    try:
        rows = read_metrics(folder)
    except OSError as error:
        return f"warning: {folder / 'metrics.jsonl'} cannot be read: {error}; there is no summary"
    lines = [summary(rows, folder)]
    contents = {"summary.txt": lines[0] + "\n"} | ({"learning_curve.png": draw(rows)} if rows else {})
    for name, content in contents.items():
        try:
            write_atomically(folder / name, content)
        except OSError as error:
            lines.append(f"  warning: {folder / name} cannot be written: {error}")
    return "\n".join(lines)


def summary(rows: Sequence[dict], folder: Path) -> str:
    """Returns the conclusion in one line, then accuracy before and after by source, purification, seconds per phase."""
    steps = [row for row in rows if "timing_s/step" in row]
    lines = [f"run {folder}: {len(steps)} steps", f"  {conclusion.learning(rows)}"]
    for name in accuracy_names(rows):
        curve = [row[name] for row in rows if name in row]
        lines.append(f"  accuracy on {source_of(name)}: {100 * curve[0]:.1f} % before, {100 * curve[-1]:.1f} % after")
    if steps:
        lines.append(f"  {conclusion.purification(steps)}")
        lines += [f"  {sentence}" for sentence in (conclusion.cost(steps),) if sentence]
        means = [(phase, [row[f"timing_s/{phase}"] for row in steps if f"timing_s/{phase}" in row]) for phase in PHASES]
        phases = ", ".join(f"{phase} {sum(values) / len(values):.2f}" for phase, values in means if values)
        lines.append(f"  seconds per phase (mean): {phases}")
        lines.append(f"  peak memory of one process: {max(r['perf/cpu_memory_used_gb'] for r in steps):.2f} GiB")
    lines.append(f"  files: {folder}/learning_curve.png, metrics.jsonl, rollouts/, checkpoints/*/hf, tensorboard/")
    return "\n".join(lines)


def draw(rows: Sequence[dict]) -> bytes:
    """Returns a PNG image of training reward, held-out accuracy and the effect of purification, against steps.

    The titles state the conclusions.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [row for row in rows if "critic/rewards/mean" in row]
    x = [row["step"] for row in steps]
    left.plot(x, [row["critic/rewards/mean"] for row in steps], color="0.7", label="training reward (first wave)")
    for name in accuracy_names(rows):
        points = [(row["step"], row[name]) for row in rows if name in row]
        left.plot(*zip(*points, strict=True), marker="o", label=f"accuracy, {source_of(name)}")
    left.set(xlabel="step", ylabel="share correct", ylim=(0, 1))
    for name, label in (
        ("lens/purified_rate", "hard prompts, sampled again"),
        ("lens/rescued_rate", "prompts rescued"),
        ("lens/zero_variance_before", "groups without contrast, before"),
        ("lens/zero_variance_after", "groups without contrast, after"),
    ):
        right.plot(x, [row[name] for row in steps], label=label)
    right.set(xlabel="step", ylabel="share of prompts", ylim=(0, 1))
    for axes, sentence in ((left, conclusion.learning(rows)), (right, conclusion.purification(steps))):
        title = axes.set_title(textwrap.fill(sentence, _TITLE_WIDTH), fontsize="small", loc="left")
        for text in (title, *axes.legend(fontsize="small").get_texts()):
            text.set_parse_math(False)  # a `$` in a source's name begins no formula
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib draws a box instead
        figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    return image.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the summary; returns the exit status, 2 for a folder without a run."""
    parser = ArgumentParser(prog="python -m lens_megatron.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="run.directory")
    folder = parser.parse_args(arguments).folder
    try:
        if not (folder / "metrics.jsonl").is_file():
            raise OSError(f"{folder} has no metrics.jsonl; give the folder of a run")
        print_text(write(folder))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        print(f"error: {folder}/metrics.jsonl is not as a run writes it ({why}); restore it", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
