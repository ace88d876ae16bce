"""Chooses the groups that the page can show, and writes them as JSON for page.js."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lens_megatron.tools.report.digest import RunDigest, interest
from lens_megatron.tools.report.rollout_groups import RolloutGroup, ShownCompletion

MOST_BYTES = 5_500_000
"""The groups' share of a page, which must stay under 10 MB together with the charts and their library."""


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """A group of a run, as the page holds it."""

    run: str
    group: RolloutGroup
    json: str


@dataclass(frozen=True, slots=True)
class Browser:
    """The groups that the page shows."""

    groups: tuple[ShownGroup, ...]
    note: str
    """A sentence on how many groups there are, and which of them are shown."""

    @property
    def json(self) -> str:
        """The groups as a JSON array."""
        return "[" + ",".join(shown.json for shown in self.groups) + "]"


def choose(digests: Sequence[RunDigest], most_bytes: int = MOST_BYTES) -> Browser:
    """Chooses groups evenly over the steps: of every step the most telling one, then of every step the second, ...

    A prompt that several runs have in the same step is taken from all of them, and first, so that they can be compared.
    """
    by_step = _same_prompts(digests)
    chosen: list[ShownGroup] = []
    room = most_bytes
    for place in range(max(map(len, by_step.values()), default=0)):
        for prompts in by_step.values():
            for run, group in prompts[place] if place < len(prompts) else ():
                shown = ShownGroup(run, group, _encoded(run, group))
                if len(shown.json) < room:
                    chosen.append(shown)
                    room -= len(shown.json) + 1
    order = {digest.run.name: place for place, digest in enumerate(digests)}
    chosen.sort(key=lambda shown: (order[shown.run], shown.group.step, not shown.group.gate, shown.group.prompt_index))
    total = sum(step.groups_in_file for digest in digests for step in digest.steps)
    note = f"All {total:,} groups are here."
    if len(chosen) < total:
        note = (
            f"{len(chosen):,} of {total:,} groups are here, chosen evenly over the steps, rescued ones first; the "
            "others are in the folder rollouts/ of the run."
        )
    return Browser(tuple(chosen), note)


def _same_prompts(digests: Sequence[RunDigest]) -> dict[int, list[list[tuple[str, RolloutGroup]]]]:
    """Returns for every step, ascending, its prompts, each with the groups of the runs that sampled it."""
    prompts: dict[int, dict[int, list[tuple[str, RolloutGroup]]]] = {}
    for digest in digests:
        for group in (group for step in digest.steps for group in step.groups):
            found = prompts.setdefault(group.step, {}).setdefault(group.prompt_index, [])
            found.append((digest.run.name, group))

    def telling(groups: list[tuple[str, RolloutGroup]]) -> tuple[int, tuple[bool, bool, int]]:
        return len({run for run, _ in groups}), max(interest(group) for _, group in groups)

    return {step: sorted(prompts[step].values(), key=telling, reverse=True) for step in sorted(prompts)}


def _encoded(run: str, group: RolloutGroup) -> str:
    """Returns a group as JSON that may stand in a <script>: no text of a model can end that element."""
    value = {
        "run": run,
        "step": group.step,
        "prompt": group.prompt_index,
        "source": group.source,
        "answer": group.answer,
        "gate": group.gate,
        "second": group.second_wave,
        "tokens": [token.text for token in group.tokens],
        "scores": [_rounded(token.score) for token in group.tokens] if _has_scores(group) else None,
        "deleted": [i for i, token in enumerate(group.tokens) if token.deleted],
        "noise": [i for i, token in enumerate(group.tokens) if token.noise],
        "completions": [_completion(completion) for completion in group.completions],
    }
    return script_json(value)


def _has_scores(group: RolloutGroup) -> bool:
    return any(token.score is not None for token in group.tokens)


def _completion(completion: ShownCompletion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "status": completion.status,
        "reward": _rounded(completion.reward),
        "weight": _rounded(completion.weight),
        "advantage": _rounded(completion.advantage),
        "second": completion.second,
        "tokens": completion.tokens,
        "finished": completion.finished,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def script_json(value: Any) -> str:
    """Returns `value` as JSON without the characters that could end a <script> element or begin a comment in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
