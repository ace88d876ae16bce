"""Writes what a day on a GPU has found, as Markdown: a row per case, then every failure, skip and rest by name."""

from collections.abc import Sequence

from benchmarks.gpu_session.journal import Outcome, Record, Status
from benchmarks.gpu_session.plan import Case


def render(cases: Sequence[Case], record: Record) -> str:
    """Returns the page; a case that has not been run, or was interrupted, is named as left for the next call."""
    found = record.outcomes
    left = [case.name for case in cases if is_left(found.get(case.name))]
    parts = ["# A day on a GPU", "", *_about(record), *_counts(cases, record), ""]
    parts += ["| case | end | seconds | what was found | what it answers |", "|---|---|---|---|---|"]
    parts += [_row(case, found.get(case.name)) for case in cases]
    for title, status in (("Failed", Status.FAILED), ("Skipped", Status.SKIPPED)):
        named = [found[c.name] for c in cases if c.name in found and found[c.name].status is status]
        parts += ["", f"## {title}: {len(named)}", "", *(f"* **{o.case}**: {o.reason}" for o in named)]
    parts += ["", f"## Left for the next call: {len(left)}", "", *(f"* {name}" for name in left)]
    return "\n".join(parts) + "\n"


def is_left(outcome: Outcome | None) -> bool:
    """Returns whether a case is still to be run."""
    return outcome is None or outcome.status is Status.INTERRUPTED


def _about(record: Record) -> list[str]:
    machines = sorted({outcome.machine for outcome in record.outcomes.values() if outcome.machine})
    commits = sorted({outcome.commit for outcome in record.outcomes.values() if outcome.commit})
    lines = [f"Machine: {'; '.join(machines) or 'not known'}. Commit: {', '.join(commits) or 'not known'}."]
    if record.unreadable:
        numbers = ", ".join(map(str, record.unreadable))
        lines.append(f"Lines {numbers} of the journal cannot be read; what they said was run again or is left.")
    return lines


def _counts(cases: Sequence[Case], record: Record) -> list[str]:
    ends = [record.outcomes[case.name].status for case in cases if case.name in record.outcomes]
    counted = [f"{ends.count(status)} {status}" for status in Status if status in ends]
    return [f"{len(cases)} cases: {', '.join(counted) or 'none was run'}."]


def _row(case: Case, outcome: Outcome | None) -> str:
    cells = [case.name, "left", "", "", case.answers]
    if outcome is not None:
        cells[1:4] = [outcome.status.value, f"{outcome.seconds:.0f}", outcome.headline or outcome.reason]
    return "| " + " | ".join(_cell(text) for text in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]
