"""The numbers of a report, worked out by hand."""

import math
from pathlib import Path

import pytest
import records
import report_runs

from lens_megatron.algorithms.rescue import replace_failures
from lens_megatron.config import LensConfig
from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.output.rollout_files import rollout_lines
from lens_megatron.results import SamplingStats, StepResult
from lens_megatron.tools.demo.tokenizer import train_tokenizer
from lens_megatron.tools.report import browser, digest, phases, seeds, shares
from lens_megatron.tools.report.rollout_groups import PromptToken, marked_pieces, read_step
from lens_megatron.tools.report.run_data import RunData, read_runs
from lens_megatron.tools.report.seeds import Band, BandPoint, Configuration
from lens_megatron.tools.report.speed_up import SpeedUp, speed_ups
from lens_megatron.types import Sample


def run(name: str, values: dict[int, float], options: dict[str, str] | None = None) -> RunData:
    rows = tuple({"step": step, "x": value} for step, value in values.items())
    return RunData(Path(name), name, rows, options or {}, ())


def curve(name: str, *points: tuple[int, float]) -> Band:
    return Band(name, tuple(BandPoint(step, mean, None, None, 1) for step, mean in points))


def test_seeds_of_one_configuration_are_found_and_named_by_what_their_names_share():
    options = {"lens.tau": "0.5", "run.seed": "0"}
    runs = [
        run("lens_s0", {}, options),
        run("other", {}),
        run("lens_s1", {}, options | {"run.seed": "1"}),
        run("lens_late", {}, {"lens.tau": "0.4"}),
    ]
    found = seeds.configurations(runs)
    assert [(c.name, [r.name for r in c.runs]) for c in found] == [
        ("lens", ["lens_s0", "lens_s1"]),
        ("other", ["other"]),
        ("lens_late", ["lens_late"]),
    ]
    alike = [run(f"a/seed{i}", {}, {"x": "1"}) for i in (0, 1)] + [run(f"a/seed{i}", {}, {"x": "2"}) for i in (2, 3)]
    assert [c.name for c in seeds.configurations(alike)] == ["a (1)", "a (2)"]


def test_a_band_has_the_mean_and_students_interval_or_the_range_of_two_runs():
    three = Configuration("c", tuple(run(str(v), {1: v, 2: 0.0}) for v in (1.0, 2.0, 3.0)) + (run("without", {}),))
    first, second = seeds.band(three, seeds.metric("x")).points
    # The standard deviation is 1, and t with 2 degrees of freedom 4.303.
    assert (first.mean, first.runs) == (2.0, 3) and first.high == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert (second.low, second.high) == (0.0, 0.0)
    two = Configuration("c", (run("a", {1: 1.0, 2: 5.0}), run("b", {1: 3.0})))
    assert seeds.band(two, seeds.metric("x")).points == (BandPoint(1, 2.0, 1.0, 3.0, 2),)
    one = Configuration("c", (run("a", {1: 1.0}),))
    assert seeds.band(one, seeds.metric("x")).points == (BandPoint(1, 1.0, None, None, 1),)
    assert seeds.t_quantile(30) == 2.042 and seeds.t_quantile(31) == 1.960


def test_the_accuracy_of_one_run_has_the_interval_of_its_evaluation():
    rows = ({"step": 0, "val-core/toy/acc/mean@2": 0.5, "val-aux/toy/acc/standard_error": 0.1},)
    (point,) = seeds.accuracy_band(Configuration("c", (RunData(Path(), "c", rows, {}, ()),))).points
    assert (point.low, point.high) == (pytest.approx(0.5 - 0.196), pytest.approx(0.5 + 0.196))


def test_thinning_keeps_the_last_point():
    kept = seeds.thinned(curve("c", *((step, 0.0) for step in range(10))), 4)
    assert [point.step for point in kept.points] == [0, 3, 6, 9]


def test_speed_up_is_the_steps_to_the_best_of_the_other_over_ones_own():
    slow, fast = (
        curve("slow", (0, 0.1), (20, 0.3), (40, 0.4), (60, 0.35)),
        curve("fast", (0, 0.1), (20, 0.4), (40, 0.5)),
    )
    never = curve("never", (0, 0.2), (20, 0.1))
    found = {(s.faster, s.other): s for s in speed_ups([slow, fast, never])}
    assert found["fast", "slow"] == SpeedUp("fast", "slow", 0.4, 40, 20) and found["fast", "slow"].factor == 2.0
    assert found["slow", "fast"].step is None and "never reaches" in found["slow", "fast"].sentence()
    assert not any(other == "never" for _, other in found), "its best is where it began, and no mark to reach"
    text = "fast reaches the best of slow (40.0 % at step 40) at step 20, 2.00 times fewer steps."
    assert found["fast", "slow"].sentence() == text
    assert "2.00 times more steps" in SpeedUp("a", "b", 0.4, 10, 20).sentence()


@pytest.mark.parametrize("described", [True, False], ids=["with tokens", "as version 0.2 wrote them"])
def test_groups_are_read_with_deletions_grades_and_success(tmp_path: Path, described: bool):
    lines = [
        *report_runs.samples(4, 7, "01R", gate=True, described=described),
        *report_runs.samples(4, 8, "00", described=described),
        *report_runs.samples(4, 9, "11", described=described),
    ]
    report_runs.write_lines(tmp_path / "file", lines)
    with (tmp_path / "file").open("a") as file:
        file.write('[1]\n{"completion": "half of a li\n{"completion": "no other key"}\n')
    read = read_step(tmp_path / "file")
    assert read.broken == 3 and [group.prompt_index for group in read.groups] == [7, 8, 9]
    rescued = read.groups[0]
    assert [t.text for t in rescued.tokens if t.deleted] == [" 9"] and rescued.gate and rescued.second_wave
    assert "".join(t.text for t in rescued.tokens) == "Tom has 9 <b>nuts</b>"
    # Of three rollouts of the first wave one is correct; the rescued one stands for the third.
    assert rescued.success_before == pytest.approx(1 / 3)
    assert not read.groups[1].second_wave and not any(t.deleted for t in read.groups[1].tokens)
    if described:
        assert [c.text for c in rescued.completions if not c.trained] == ["replaced", "refused"]
        assert [t.noise for t in rescued.tokens] == [False, False, True, True]
    found = shares.step_shares(4, read.groups)
    assert found is not None
    assert (found.failure, found.mid, found.high) == (pytest.approx(1 / 3),) * 3
    assert (found.zero_before, found.zero_after) == (pytest.approx(1 / 3),) * 2


def test_a_group_that_a_second_wave_rescued_from_nothing_has_no_zero_reward_afterwards(tmp_path: Path):
    report_runs.write_lines(tmp_path / "file", report_runs.samples(1, 1, "0R", gate=True))
    (group,) = read_step(tmp_path / "file").groups
    assert group.success_before == 0 and group.zero_before and not group.zero_after


def test_what_a_run_writes_is_read(tmp_path: Path):
    tokenizer = Tokenizer(train_tokenizer(["Tom has 9 nuts."]))
    merged = replace_failures(records.group("0010", "0101"), LensConfig(), seed=0)
    trained = tuple(Sample((), (), rollout, 0.25, 2.0) for rollout in merged.rollouts)
    result = StepResult(1, (merged,), trained, (), (), None, SamplingStats(), 0)
    (tmp_path / "file").write_text("\n".join(rollout_lines(result, tokenizer, 5)))
    read = read_step(tmp_path / "file")
    (group,) = read.groups
    assert read.broken == 0 and (group.step, group.prompt_index, group.gate) == (5, 3, True)
    assert group.success_before == 0.25 and [c.correct for c in group.trained].count(True) == 3
    assert {(c.weight, c.advantage) for c in group.trained} == {(2.0, 0.25)}


def test_marks_are_told_from_brackets_of_the_prompt():
    kept, gone = PromptToken, lambda text: PromptToken(text, deleted=True)
    assert marked_pieces("a b c", "a[- b-] c") == (kept("a"), gone(" b"), kept(" c"))
    assert marked_pieces("[-1-] b", "[-1-][- b-]") == (kept("[-1-] b"),), "whose mark is the first?"
    assert marked_pieces("[-1, b", "[-1,[- b-]") == (kept("[-1, b"),)
    assert marked_pieces("a", None) == (kept("a"),)


def test_scores_are_counted_in_quarters_of_a_decade():
    bins = shares.histogram(
        [shares.TokenScore(1.0, True), shares.TokenScore(1.5, False), shares.TokenScore(12.0, False)]
    )
    assert [(b.deleted, b.kept) for b in bins] == [(1, 1), (0, 0), (0, 0), (0, 0), (0, 1)]
    assert bins[0].low == 1.0 and bins[0].high == pytest.approx(10**0.25) and bins[-1].low == 10.0
    assert sum(b.kept for b in shares.added([bins, bins])) == 4
    (lowest,) = shares.histogram([shares.TokenScore(0.0, False)])
    assert lowest.low == 1e-4, "a score of 0 has no logarithm, and is counted in the first bin"


def test_precision_counts_noise_among_deleted_and_among_eligible_tokens(tmp_path: Path):
    report_runs.write_lines(tmp_path / "file", report_runs.samples(1, 1, "0R", gate=True))
    found = shares.noise_precision(1, read_step(tmp_path / "file").groups)
    assert found == shares.NoisePrecision(1, deleted=1, deleted_noise=1, eligible=3, eligible_noise=2)


def test_seconds_of_a_step_are_divided_without_a_rest_left_over():
    rows = (report_runs.metrics(1), report_runs.metrics(2) | {"timing_s/testing": 4.0})
    found = {p.phase: p.seconds for p in phases.mean_seconds(Configuration("c", (RunData(Path(), "c", rows, {}, ()),)))}
    assert (found["sample and grade"], found["update"], found[phases.OTHER]) == (2.0, 3.0, 1.0)
    assert found["evaluate and probe"] == 2.0, "4 seconds, spread over two steps"


def test_groups_are_chosen_evenly_over_steps_and_runs_within_the_limit(tmp_path: Path):
    lines = {s: [x for p in range(5) for x in report_runs.samples(s, p, "01")] for s in (1, 2, 3)}
    runs = read_runs(
        tuple(report_runs.write_run(tmp_path / name, [report_runs.metrics(1)], rollouts=lines) for name in ("a", "b"))
    )
    digests = [digest.RolloutReader().read(run) for run in runs]
    everything = browser.choose(digests)
    assert everything.note == "All 30 groups are here." and len(everything.groups) == 30
    room = sum(len(shown.json) + 1 for shown in everything.groups) * 6 // 30 + 50
    few = browser.choose(digests, room)
    assert [(shown.run, shown.group.step) for shown in few.groups] == [(r, s) for r in "ab" for s in (1, 2, 3)]
    assert len({shown.group.prompt_index for shown in few.groups}) == 1, "the same prompt, so that runs compare"
    assert len(few.json) <= room and few.note.startswith("6 of 30 groups are here")


def test_long_texts_are_cut_and_say_so(tmp_path: Path):
    long = "a" * 1500 + "b" * 1500 + "c" * 500
    report_runs.write_lines(tmp_path / "file", report_runs.samples(1, 1, "0", text=long))
    (group,) = map(digest.shortened, read_step(tmp_path / "file").groups)
    text = group.completions[0].text
    assert text == "a" * 1500 + "\n[... 1,500 characters left out ...]\n" + "c" * 500


def test_a_file_is_read_again_only_if_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rollouts = {1: report_runs.samples(1, 1, "01"), 2: report_runs.samples(2, 1, "01")}
    folder = report_runs.write_run(tmp_path / "run", [report_runs.metrics(1)], rollouts=rollouts)
    (found,) = read_runs((folder,))
    read: list[str] = []
    monkeypatch.setattr(digest, "read_step", lambda path: [read.append(path.name), read_step(path)][1])
    reader = digest.RolloutReader()
    reader.read(found)
    report_runs.write_lines(folder / "rollouts" / "step_000002.jsonl", report_runs.samples(2, 1, "0111"))
    assert [step.shares.mid for step in reader.read(found).steps if step.shares] == [1.0, 1.0]
    assert read == ["step_000001.jsonl", "step_000002.jsonl", "step_000002.jsonl"]
    monkeypatch.setattr(digest, "MOST_BYTES", 10)
    assert "rollouts of 1 of 2 steps" in reader.read(found).notes[0]
