"""Folders of runs, written by hand as a run writes them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NASTY = "</script><script>document.body.dataset.hacked = 'yes'</script><img src=x onerror=alert(1)> & \u2028 <!--"
"""A completion that would end the element it stands in, if it were written as it is."""


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    seed: int = 0,
    method: str = "lens",
    rollouts: dict[int, Sequence[dict[str, Any]]] | None = None,
) -> Path:
    """Writes metrics, options and rollouts of a run; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"run": {"seed": seed, "directory": str(folder)}, "lens": {"purifier": method}}
    (folder / "config.yaml").write_text(json.dumps(options))  # JSON is YAML
    for step, lines in (rollouts or {}).items():
        (folder / "rollouts").mkdir(exist_ok=True)
        write_lines(folder / "rollouts" / f"step_{step:06d}.jsonl", lines)
    return folder


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(step: int, accuracy: float | None = None, reward: float = 0.5) -> dict[str, Any]:
    """Returns the row of a step; its phases take 5 of the step's 6 seconds."""
    evaluated = {"val-core/toy/acc/mean@2": accuracy, "val-aux/toy/acc/standard_error": 0.02}
    return {
        "step": step,
        "critic/rewards/mean": reward,
        "actor/entropy": 1.0 / step,
        "lens/prompts": 2.0,
        "lens/purified_prompts": 1.0,
        "lens/rescued_prompts": 1.0,
        "lens/extra_rollouts": 2.0,
        "lens/purified_rate": 0.5,
        "lens/rescued_rate": 0.5,
        "timing_s/gen": 2.0,
        "timing_s/update_actor": 3.0,
        "timing_s/step": 6.0,
        **(evaluated if accuracy is not None else {}),
    }


def samples(
    step: int, prompt: int, outcomes: str, *, gate: bool = False, text: str = "\\boxed{1}", described: bool = True
) -> list[dict[str, Any]]:
    """Returns the lines of a group. `outcomes` spells trained rollouts: "01R" is a failure, a success, a rescued one.

    Args:
        gate: a second wave of two was sampled, and its only success replaced a failure; else there was none.
        described: the first line has `group`, as files have since version 0.3.
    """
    tokens = ["Tom", " has", " 9", " <b>nuts</b>"]
    marked = "Tom has[- 9-] <b>nuts</b>" if gate else None
    lines = [
        {
            "step": step,
            "prompt_index": prompt,
            "source": "toy",
            "prompt": "".join(tokens),
            "purified_prompt": marked,
            "answer": "1",
            "weight": 1.0,
            "advantage": 0.5,
            "gate": gate,
            **_rollout(text, outcome),
        }
        for outcome in outcomes
    ]
    if described:
        lines[0]["group"] = {
            "prompt_tokens": tokens,
            "eligible": [False, True, True, True],
            "scores": [0.0, 0.1, 2.0, 0.01],
            "deleted": [2],
            "noise": [2, 3],
            "sampled_again": gate,
            "left_out": [_rollout("replaced", "0"), _rollout("refused", "r")] if gate else [],
        }
    return lines


def _rollout(text: str, outcome: str) -> dict[str, Any]:
    """`outcome`: 0 and 1 are first-wave failures and successes, r and R those of the second wave."""
    right = outcome in "1R"
    return {
        "completion": text,
        "status": "correct" if right else "wrong",
        "reward": float(right),
        "origin": "purified" if outcome in "rR" else "native",
        "response_tokens": 3,
        "finished": True,
        "weight_version": 0,
    }
