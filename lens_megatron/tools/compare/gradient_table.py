"""The methods' gradients on the same batch as Markdown."""

from collections.abc import Iterator

from lens_megatron.tools.compare.gradient_report import GradientReport, GroupCosines


def render(report: GradientReport) -> str:
    """Returns the report as Markdown."""
    names = [method.method for method in report.methods]
    lines = [
        f"# Gradients of {len(names)} methods on one batch, at {report.fork}",
        "",
        f"The batch has {report.prompts} prompts; {report.second_waves} of them were sampled a second time, with "
        "tokens deleted by interference. Norms are those before clipping. No step was taken.",
        "",
        f"| method | groups | norm | {' | '.join(report.layer_groups)} |",
        f"|{'---|' * (3 + len(report.layer_groups))}",
        *(_row(m.method, str(m.groups), f"{m.norm:.4g}", *(f"{norm:.3g}" for norm in m.norms)) for m in report.methods),
        "",
        "## Cosines over all parameters",
        "",
        *_matrix(names, report.whole),
        "",
        "## Cosines by layer group",
        "",
        *_pairs(names, report.by_group),
        "",
        "## What the methods make of the response tokens",
        "",
        "| method | tokens of | rollouts | tokens | mean weight | mean advantage | share of all weight x advantage |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in report.methods:
        for c in method.classes:
            lines.append(
                _row(
                    *(method.method, c.name, str(c.rollouts), str(c.tokens)),
                    *(f"{c.weight:.3f}", f"{c.advantage:+.3f}", f"{100 * c.share:.0f} %"),
                )
            )
    lines += [
        "",
        "Means are over tokens; the share is of absolute values. It says how much of the loss a class is about if "
        "every token counts alike and the ratio is 1; the ratio of a rescued token is mostly smaller, and so is its "
        "part of the gradient.",
    ]
    return "\n".join(lines) + "\n"


def _matrix(names: list[str], group: GroupCosines) -> Iterator[str]:
    yield f"| | {' | '.join(names)} |"
    yield f"|{'---|' * (1 + len(names))}"
    for name, row in zip(names, group.cosines, strict=True):
        yield _row(name, *map(_cosine, row))


def _pairs(names: list[str], groups: tuple[GroupCosines, ...]) -> Iterator[str]:
    yield f"| methods | {' | '.join(group.name for group in groups)} |"
    yield f"|{'---|' * (1 + len(groups))}"
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            yield _row(f"{second}, {first}", *(_cosine(group.cosines[i][j]) for group in groups))


def _cosine(value: float | None) -> str:
    return "no gradient" if value is None else f"{value:+.3f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
