"""What the summary and the learning curve tell a reader, from made-up metrics of each case."""

import json
from pathlib import Path

import pytest

from lens_megatron.output import conclusion, report

NOTHING = "No accuracy was measured, so nothing can be said about learning; data.eval names held-out problems."
NAME, NOISE = "val-core/eval/acc/mean@2", "val-aux/eval/acc/standard_error"


def row(step: int, accuracy: float | None = None, noise: float | None = 0.03, **lens: float) -> dict:
    found = {"step": step} | ({} if accuracy is None else {NAME: accuracy})
    found |= {} if accuracy is None or noise is None else {NOISE: noise}
    return found | {f"lens/{name}": value for name, value in lens.items()}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row(0, 0.258, 0.027), row(60, 0.373)],
         "Accuracy on eval rose from 25.8 % to 37.3 % in 60 steps (+11.5 points; the noise of one evaluation is +-3.0):"
         " this run learned."),
        ([row(0, 0.373), row(30, 0.5), row(60, 0.2)],
         "Accuracy on eval fell from 37.3 % to 20.0 % in 60 steps (-17.3 points; the noise of one evaluation is +-3.0):"
         " this run made the policy worse."),
        ([row(0, 0.30), row(60, 0.38)],
         "Accuracy on eval rose from 30.0 % to 38.0 % in 60 steps (+8.0 points; the noise of one evaluation is +-3.0): "
         "this is within the noise, so the run shows neither learning nor harm; take more steps or more problems."),
        ([row(0, 0.0, 0.0), row(60, 0.0, 0.0)],
         "Accuracy on eval stayed at 0.0 % in 60 steps (+0.0 points; the noise of one evaluation is +-0.0): this is "
         "within the noise, so the run shows neither learning nor harm; take more steps or more problems."),
        ([row(0, 0.2, None), row(60, 0.4, None)],
         "Accuracy on eval rose from 20.0 % to 40.0 % in 60 steps (+20.0 points): the noise is not in the metrics, so "
         "it may be chance."),
        ([row(0, 0.258), row(1), row(2)],
         "Accuracy on eval is 25.8 % at step 0 (+-3.0), the only evaluation: whether the run learns shows at the next "
         "one."),
        ([row(1)], NOTHING),
        ([], NOTHING),
    ],
    ids=["rose", "fell", "noise", "still", "unknown_noise", "one", "none", "empty"],
)  # fmt: skip
def test_the_sentence_on_learning(rows: list[dict], sentence: str):
    assert conclusion.learning(rows) == sentence


def test_several_sources_are_judged_by_their_mean_whose_noise_is_smaller():
    other, noise = "val-core/math/acc/mean@1", "val-aux/math/acc/standard_error"
    rows = [row(0, 0.2) | {other: 0.4, noise: 0.04}, row(10, 0.9), row(60, 0.3) | {other: 0.5, noise: 0.04}]
    assert [(e.step, e.accuracy) for e in conclusion.evaluations(rows)] == [(0, pytest.approx(0.3)), (60, 0.4)]
    # Standard errors 0.03 and 0.04: that of their mean is 0.05 / 2.
    assert conclusion.learning(rows) == (
        "The mean accuracy of 2 sources rose from 30.0 % to 40.0 % in 60 steps (+10.0 points; the noise of one "
        "evaluation is +-2.5): this run learned."
    )


def test_the_sentence_on_purification():
    rows = [row(n, prompts=32, purified_prompts=hard, rescued_prompts=rescued, extra_rollouts=8 * hard)
            for n, hard, rescued in ((1, 12, 3), (2, 8, 2))]  # fmt: skip
    assert conclusion.purification(rows) == (
        "Of 64 prompts 20 were hard and sampled again, with 160 rollouts; 5 of them (25 %) were rescued."
    )
    none = [row(1, prompts=32, purified_prompts=0, rescued_prompts=0, extra_rollouts=0)]
    assert conclusion.purification(none) == "Of 32 prompts none was sampled again."


def test_the_sentence_on_the_cost_of_second_waves():
    """Shares of 32 prompts: 8 and 4 groups were without contrast before, 2 and 4 after."""
    counts = {"prompts": 32, "extra_rollouts": 96, "extra_tokens": 1500, "extra_seconds": 1.25}
    rows = [row(n, **counts, destroyed_groups=n, zero_variance_before=before / 32, zero_variance_after=after / 32)
            for n, before, after in ((1, 8, 2), (2, 4, 4))]  # fmt: skip
    assert conclusion.cost([row(0, 0.2), *rows]) == (
        "Second waves took 192 rollouts, 3,000 tokens and 2.5 s more; 12 groups were without contrast before them, 6 "
        "after; 3 groups lost their contrast by them."
    )
    assert conclusion.cost([row(1, prompts=32, extra_rollouts=0, extra_tokens=0)]) is None
    assert conclusion.cost([row(1, prompts=32, extra_rollouts=96)]) is None  # a version that did not count tokens
    assert conclusion.cost([]) is None


def test_summary_and_picture_begin_with_what_to_conclude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [row(0, 0.258, 0.027), row(60, 0.373)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    titles: list[str] = []
    set_title = report.pyplot.Axes.set_title

    def remember(axes: object, text: str, **options: object) -> object:
        titles.append(" ".join(text.split()))
        return set_title(axes, text, **options)

    monkeypatch.setattr(report.pyplot.Axes, "set_title", remember)
    summary = report.write(tmp_path)
    assert summary.splitlines()[1].strip() == titles[0] == conclusion.learning(rows)
    assert titles[1] == "Of 0 prompts none was sampled again."
