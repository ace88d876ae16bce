"""Which prompts a step samples, and which of their groups it trains on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from chosen import method
from records import PROMPT, group

from lens_megatron.algorithms.registry import Kind, names
from lens_megatron.algorithms.rescue import replace_failures
from lens_megatron.algorithms.selection import Selection
from lens_megatron.algorithms.selection.greso import Greso
from lens_megatron.config import ConfigError, LensConfig
from lens_megatron.data.prompts import PromptStream
from lens_megatron.results import Outcome
from lens_megatron.types import GroupNumbers, Prompt

METHODS = names(Kind.SELECTION)
REFILLING = ("dynamic_sampling", "greso")


def stream(size: int, shuffle: bool = True) -> PromptStream:
    """`size` prompts whose rows of the dataset are 100, 101, ..."""
    return PromptStream([replace(PROMPT, index=100 + row) for row in range(size)], 3, shuffle)


def selection(name: str, source: PromptStream, seed: int = 5, **options) -> Selection:
    chosen = method(Kind.SELECTION, name, **options)
    return chosen.call(source, seed, chosen.options)


def greso(source: PromptStream, streaks: dict[int, int] | None = None, **options) -> Greso:
    made = selection("greso", source, **options)
    assert isinstance(made, Greso)
    made.streaks = dict(streaks or {})
    return made


def outcomes(prompts: Sequence[Prompt], *rates: float) -> list[Outcome]:
    """One outcome per prompt, with the given success rates over and over."""
    return [
        Outcome(place, prompt.index, 0 < rates[place % len(rates)] < 1, 0.5, rates[place % len(rates)], 10, 0)
        for place, prompt in enumerate(prompts)
    ]


def indices(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


# ---- what is common to all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_candidates_are_a_function_of_the_state_and_only_observe_changes_it(name: str):
    chosen = selection(name, stream(10))
    chosen.observe(1, outcomes(chosen.candidates(1, 4), 1.0, 0.5))
    before = json.dumps(chosen.state())
    longer = chosen.candidates(2, 17)
    assert indices(chosen.candidates(2, 6)) == indices(longer)[:6], "those asked for first come first"
    assert indices(chosen.candidates(2, 17)) == indices(longer) and chosen.epoch() == chosen.epoch()
    assert json.dumps(chosen.state()) == before


@pytest.mark.parametrize("name", METHODS)
def test_what_was_not_sampled_comes_in_the_next_step(name: str):
    chosen, straight = selection(name, stream(10)), indices([stream(10).at(place) for place in range(10)])
    offered = chosen.candidates(1, 8)
    chosen.observe(1, outcomes(offered[:3], 0.5))
    assert indices(offered[:3]) + indices(chosen.candidates(2, 7)) == straight
    assert chosen.epoch() == 0.3
    chosen.observe(2, [])
    assert indices(chosen.candidates(3, 7)) == straight[3:], "a step without an outcome leaves all as it was"


@pytest.mark.parametrize("name", METHODS)
def test_restored_from_json_it_goes_on_as_if_never_stopped(name: str):
    straight, after = selection(name, stream(13)), []
    for step in range(1, 40):
        if step == 20:
            saved = json.dumps(straight.state())
        offered = straight.candidates(step, 9)
        straight.observe(step, outcomes(offered[: 4 + step % 5], 1.0, 0.5, 0.0))
        after.append((step, indices(offered), straight.epoch(), json.dumps(straight.state())))
    again = selection(name, stream(13))
    again.observe(1, outcomes(again.candidates(1, 3), 0.0))
    again.restore(json.loads(saved))
    assert json.dumps(again.state()) == saved
    for step, asked, epoch, state in after[19:]:
        offered = again.candidates(step, 9)
        again.observe(step, outcomes(offered[: 4 + step % 5], 1.0, 0.5, 0.0))
        assert (indices(offered), again.epoch(), json.dumps(again.state())) == (asked, epoch, state)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_a_copy(name: str):
    chosen = selection(name, stream(4))
    chosen.observe(1, outcomes(chosen.candidates(1, 2), 1.0))
    taken = chosen.state()
    text = json.dumps(taken)
    chosen.observe(2, outcomes(chosen.candidates(2, 2), 0.0))
    assert json.dumps(taken) == text, "a background save would write another step's state"


WRONG: dict[str, dict] = {
    "nothing": {},
    "no position": {"position": None},
    "a position of words": {"position": "3"},
    "a position that is a fraction": {"position": 3.0},
    "a position that is a truth": {"position": True},
    "a position below zero": {"position": -1},
    "something else besides": {"position": 3, "other": 1},
    "no number": {"p_easy": "x"},
    "a probability out of bounds": {"p_hard": 1.5},
    "no list": {"prompts": 7},
    "a list of words": {"prompts": ["a"], "streaks": [1]},
    "one streak too few": {"prompts": [1, 2], "streaks": [1]},
    "a prompt twice": {"prompts": [1, 1], "streaks": [1, 2]},
    "a streak of nothing": {"prompts": [1], "streaks": [0]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_is_none_raises_and_changes_nothing(wrong: str):
    for name in METHODS if "position" in WRONG[wrong] else ["greso"]:
        chosen = selection(name, stream(4))
        chosen.observe(1, outcomes(chosen.candidates(1, 2), 1.0))
        before = json.dumps(chosen.state())
        with pytest.raises((ValueError, KeyError, TypeError)):
            chosen.restore(chosen.state() | WRONG[wrong] if WRONG[wrong] else {})
        assert json.dumps(chosen.state()) == before


@pytest.mark.parametrize("name", REFILLING)
def test_another_methods_state_is_refused(name: str):
    other = selection("greso" if name == "dynamic_sampling" else "dynamic_sampling", stream(4))
    with pytest.raises(ValueError, match="expected .*position.*found .*position"):
        selection(name, stream(4)).restore(other.state())


@pytest.mark.parametrize("name", REFILLING)
@pytest.mark.parametrize(
    ("native", "rescue", "kept"),
    [
        ("1100", "", True),
        ("1111", "", False),
        ("0000", "", False),
        ("0000", "0100", True),  # the second wave brings the signal
        ("0001", "1110", False),  # the second wave takes it away: every failure is replaced
        ("0001", "0000", True),
    ],
)
def test_groups_are_judged_as_they_are_trained_on(name: str, native: str, rescue: str, kept: bool):
    chosen = selection(name, stream(4))
    merged = replace_failures(group(native, rescue), LensConfig(tau=1.0), seed=1)
    assert chosen.refills and chosen.keep(merged) is kept
    everything = selection("every_prompt", stream(4))
    assert not everything.refills and everything.keep(merged)


@pytest.mark.parametrize("name", REFILLING)
def test_verdicts_judge_not_rewards(name: str):
    """A length penalty spreads the rewards of a group without a success: it stays without a signal."""
    merged = replace_failures(group("0000"), LensConfig(), seed=1)
    shaped = replace(merged, rollouts=tuple(replace(r, reward=-0.1 * place) for place, r in enumerate(merged.rollouts)))
    assert len(set(GroupNumbers.of(shaped).rewards)) == 4 and not selection(name, stream(4)).keep(shaped)


# ---- GRESO --------------------------------------------------------------------------------------------------------

TABLE = [(0, 0.5, 0.0), (1, 0.5, 0.5), (2, 0.5, 0.75), (3, 0.5, 0.875), (7, 0.5, 0.99), (3, 0.8, 0.488)]


@pytest.mark.parametrize(("z", "p", "skipped"), TABLE)
@pytest.mark.parametrize("kind", ["easy", "hard"])
def test_the_table_of_skips(kind: str, z: int, p: float, skipped: float):
    chosen = greso(stream(4), {100: z if kind == "easy" else -z}, **{f"p_{kind}": p})
    assert 1 - chosen.probability(100) == pytest.approx(skipped, abs=1e-12)
    assert chosen.probability(101) == 1, "a prompt that was never seen"


@pytest.mark.parametrize(("z", "p", "skipped"), TABLE)
def test_prompts_are_skipped_as_often_as_the_table_says(z: int, p: float, skipped: float):
    rows = 20_000
    chosen = greso(stream(rows + 1), {100 + row: -z for row in range(rows)} if z else {}, p_hard=p)
    chosen.source = PromptStream([*stream(rows, shuffle=False).prompts, replace(PROMPT, index=9)], 0, shuffle=False)
    asked = indices(chosen.candidates(1, rows + 1))
    kept = asked.index(9)  # the last prompt of the epoch has no history
    sigma = (rows * skipped * (1 - skipped)) ** 0.5
    assert abs(rows - kept - rows * skipped) <= 3 * sigma


def test_a_streak_counts_the_last_visits_in_a_row():
    chosen, (prompt, *_) = greso(stream(1)), stream(1).prompts
    found = []
    for step, rate in enumerate([1.0, 1.0, 0.0, 0.0, 0.0, 0.5, 1.0, 0.25, 0.0], start=1):
        chosen.observe(step, outcomes([prompt], rate))
        found.append(chosen.streaks.get(100, 0))
    assert found == [1, 2, -1, -2, -3, 0, 1, 0, -1]
    assert chosen.state()["prompts"] == [100] and chosen.state()["streaks"] == [-1]


def test_a_prompt_twice_in_a_step_counts_twice():
    chosen = greso(stream(1))
    chosen.observe(1, outcomes(chosen.candidates(1, 2), 1.0))
    assert chosen.streaks == {100: 2}


def test_what_was_skipped_before_the_last_sampled_prompt_waits_for_the_next_epoch():
    source = stream(200, shuffle=False)
    chosen = greso(source, {100 + row: 1 for row in range(200)})
    offered = chosen.candidates(7, 30)
    rows = [index - 100 for index in indices(offered)]
    assert rows == sorted(set(rows)) and rows[-1] > 30, "some are skipped, in order"
    chosen.observe(7, outcomes(offered[:20], 0.5))
    assert chosen.position == rows[19] + 1 and chosen.epoch() == (rows[19] + 1) / 200
    following = [index - 100 for index in indices(chosen.candidates(8, 30))]
    assert following[0] > rows[19]
    assert not set(following) & set(rows[:20])


def test_steps_and_seeds_skip_other_prompts():
    streaks = {100 + row: 1 for row in range(200)}
    drawn = [indices(greso(stream(200), streaks).candidates(step, 30)) for step in (1, 2)]
    other = greso(stream(200), streaks)
    other.seed += 1
    assert drawn[0] != drawn[1] and indices(other.candidates(1, 30)) not in drawn


def test_where_everything_would_be_skipped_one_epoch_is_and_no_place_comes_twice():
    chosen = greso(stream(50, shuffle=False), {100 + row: -5000 for row in range(50)}, exploration=0.0)
    positions = [position for position, _ in zip_walk(chosen, 120)]
    assert positions == list(range(50, 170))
    offered = chosen.candidates(1, 8)
    chosen.observe(1, outcomes(offered, 0.0))
    assert chosen.position == 58 and chosen.streaks[100] == -5001


def zip_walk(chosen: Greso, count: int) -> list[tuple[int, Prompt]]:
    walk = chosen._walk(1)
    return [next(walk) for _ in range(count)]


@pytest.mark.parametrize("exploration", [0.0, 0.01, 0.5])
def test_no_place_comes_twice(exploration: float):
    chosen = greso(stream(10), {100 + row: (-1) ** row * (1 + row) for row in range(10)}, exploration=exploration)
    assert all(a < b for (a, _), (b, _) in pairwise(zip_walk(chosen, 200)))


def test_the_probabilities_adjust_themselves_after_the_first_epoch():
    """Targets at .25: 1/12 all correct, 2/12 all wrong. Twelve groups with one of the former and one of the latter."""
    chosen, rates = greso(stream(12)), [1.0, 0.0, *[0.5] * 10]
    chosen.observe(1, outcomes(chosen.candidates(1, 12), *rates))
    assert (chosen.p_easy, chosen.p_hard) == (0.5, 0.5), "the first epoch"
    chosen.streaks.clear()
    chosen.observe(2, outcomes(chosen.candidates(2, 12), *rates))
    assert (chosen.p_easy, chosen.p_hard) == pytest.approx((0.49, 0.51)), "1/12 has reached 1/12, and not 2/12"
    chosen.streaks.clear()
    chosen.observe(3, outcomes(chosen.candidates(3, 12), 0.5))
    assert (chosen.p_easy, chosen.p_hard) == pytest.approx((0.50, 0.52))
    chosen.observe(4, outcomes(chosen.candidates(4, 4), 0.0, 0.5))
    assert (chosen.p_easy, chosen.p_hard) == pytest.approx((0.51, 0.51)), "half of the groups are all wrong"


def test_the_adjustment_has_bounds_and_can_be_switched_off():
    for options, expected in (({"adjustment": 0.5}, (0.05, 0.95)), ({"adjustment": 0.0}, (0.5, 0.5))):
        chosen = greso(stream(4), **options)
        chosen.position = 4
        for step in range(1, 4):
            chosen.observe(step, outcomes(chosen.candidates(step, 4), 1.0))
        assert (chosen.p_easy, chosen.p_hard) == expected
    with pytest.raises(ConfigError, match=r"options.p_easy: 1.0: Input should be less than or equal to 0.95"):
        greso(stream(4), p_easy=1.0)
