"""Rules that change rewards: numbers worked by hand, frequencies, and when they act in a step."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chosen import method
from records import step_prompts
from test_scheduler import PROMPTS, PURIFIED, Nothing, Verdicts
from toy_runs import Toy, launch, rollout_rows
from transformers import AutoModelForCausalLM

from lens_megatron.algorithms.entry import Method, NoOptions
from lens_megatron.algorithms.registry import Kind
from lens_megatron.algorithms.reward_rules import RewardRuleError, apply_rules, try_rules
from lens_megatron.algorithms.rewards import RolloutFacts
from lens_megatron.algorithms.rewards.rpr import PHRASES, pattern_reward, repetition
from lens_megatron.config import ConfigError, LensConfig, RolloutConfig
from lens_megatron.reward import Grade, GradeStatus
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.rewarding import Rewarding
from lens_megatron.rollout.scheduler import RolloutScheduler
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Origin

CORRECT, WRONG, UNPARSED = GradeStatus.CORRECT, GradeStatus.WRONG, GradeStatus.UNPARSED
TIMEOUT, CRASH = GradeStatus.TIMEOUT, GradeStatus.CRASH
SIX_PHRASES = "Wait, so that thus Therefore hence thereby"


def facts(**changes: object) -> RolloutFacts:
    plain = RolloutFacts(
        prompt=PROMPTS[0], completion="", tokens=10, finished=True, origin=Origin.NATIVE, step=1,
        max_response_length=20_480, group_seed=1, rollout_seed=2,
    )  # fmt: skip
    return replace(plain, **changes)


def grade(status: GradeStatus = WRONG, score: float | None = None) -> Grade:
    return Grade(status, float(status is CORRECT) if score is None else score, 0.0)


def changed(
    name: str, before: Grade, known: RolloutFacts | None = None, **options: object
) -> tuple[GradeStatus, float]:
    after = apply_rules(before, known or facts(), [method(Kind.REWARDS, name, **options)])
    return after.status, after.score


# ---- flips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "score", "flipped"),
    [
        (CORRECT, 1.0, (WRONG, 0.0)), (WRONG, 0.0, (CORRECT, 1.0)), (UNPARSED, 0.0, (CORRECT, 1.0)),
        (WRONG, 0.25, (CORRECT, 0.75)), (TIMEOUT, 0.0, (TIMEOUT, 0.0)), (CRASH, 0.0, (CRASH, 0.0)),
    ],
)  # fmt: skip
def test_a_flip_turns_reward_and_verdict_round(status: GradeStatus, score: float, flipped: tuple[GradeStatus, float]):
    assert changed("flips", grade(status, score), rate=1.0) == flipped
    assert changed("flips", grade(status, score), rate=0.0) == (status, score)


@pytest.mark.parametrize("unit", ["group", "sample"])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_flips_come_at_their_rate(unit: str, rate: float):
    count, flips = 20_000, 0
    for number in range(count):
        known = facts(group_seed=derive(number), rollout_seed=derive(number, "r"))
        flips += changed("flips", grade(WRONG), known, rate=rate, unit=unit) == (CORRECT, 1.0)
    assert abs(flips - rate * count) < 3 * math.sqrt(rate * (1 - rate) * count)


def test_whole_groups_flip_together_and_samples_alone():
    def flipped(unit: str, group: int) -> list[bool]:
        known = [facts(group_seed=derive(group), rollout_seed=derive(group, n)) for n in range(16)]
        return [changed("flips", grade(WRONG), k, unit=unit)[0] is CORRECT for k in known]

    assert {len(set(flipped("group", n))) for n in range(100)} == {1}
    assert {flipped("group", n)[0] for n in range(100)} == {True, False}
    assert sum(len(set(flipped("sample", n))) == 2 for n in range(100)) > 95


# ---- overlong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options", "penalty"),
    [
        (1, {}, 0.0), (16_384, {}, 0.0), (18_432, {}, -0.5), (20_480, {}, -1.0),
        (18_432, {"cache": 4096}, -0.5), (18_432, {"cache": 4096, "factor": 2.0}, -1.0),
        (19_456, {"cache": 2048}, -0.5),
        (20_480, {"factor": 0.0}, 0.0), (10_240, {"cache": 20_480}, -0.5),
    ],
)  # fmt: skip
def test_overlong_lowers_the_reward_and_leaves_the_verdict(tokens: int, options: dict, penalty: float):
    for status in (CORRECT, WRONG, TIMEOUT):
        before = grade(status)
        expected = (status, before.score + penalty)
        assert changed("overlong", before, facts(tokens=tokens), **options) == expected


def test_a_cache_longer_than_a_response_is_refused():
    with pytest.raises(ConfigError, match=r"overlong.cache \(7\) exceeds rollout.max_response_length \(6\)"):
        changed("overlong", grade(), facts(max_response_length=6), cache=7)


# ---- the reasoning pattern reward -----------------------------------------------------------------------------------


def test_the_pattern_reward_by_hand():
    assert len(PHRASES) == len(set(PHRASES)) == 40
    assert pattern_reward(SIX_PHRASES) == pytest.approx(0.3)
    assert pattern_reward("wait wait WAIT") == pytest.approx(0.05)  # each phrase counts once
    assert pattern_reward("first,next,") == 0.0 and pattern_reward("first, next, x") == pytest.approx(0.1)
    assert pattern_reward(" ".join(PHRASES)) == 1.0
    # 40 words make 21 sequences of 20 words; the first word again after 20 others repeats exactly one of them.
    twenty = [f"w{n}" for n in range(20)]
    assert repetition(" ".join([*twenty, *twenty])) == pytest.approx(1 / 21)
    assert repetition(" ".join(twenty)) == 0.0 and repetition(" ".join(["a"] * 19)) == 0.0
    assert repetition(" ".join(["a"] * 29)) == pytest.approx(1 / 10)  # ten equal sequences are one different one
    assert pattern_reward(SIX_PHRASES + " user: user: ") == 0.0
    assert pattern_reward(" ".join(PHRASES) + " user: x") == 0.0


def test_six_phrases_and_a_tenth_of_repetitions_pay_two_tenths():
    # A period of 9 words: 29 words have 10 sequences, and the first of them is also the tenth.
    period = SIX_PHRASES.split() + ["x", "y"]
    text = " ".join((period * 4)[:29])
    assert len(period) == 9 and repetition(text.lower()) == pytest.approx(0.1)
    assert pattern_reward(text) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "step", "before", "after"),
    [
        ({"mode": "only"}, 1, (CORRECT, 1.0), (CORRECT, 0.3)),
        ({"mode": "only"}, 1, (WRONG, 0.0), (WRONG, 0.3)),
        ({"mode": "only"}, 1, (CRASH, 0.0), (CRASH, 0.3)),
        ({"mode": "warmup", "warmup_steps": 20}, 20, (CORRECT, 1.0), (CORRECT, 0.3)),
        ({"mode": "warmup", "warmup_steps": 20}, 21, (CORRECT, 1.0), (CORRECT, 1.0)),
        ({"mode": "warmup", "warmup_steps": 20}, 21, (WRONG, 0.0), (WRONG, 0.0)),
        ({"mode": "wrong"}, 1, (CORRECT, 1.0), (CORRECT, 1.0)),
        ({"mode": "wrong"}, 1, (WRONG, 0.0), (WRONG, 0.3)),
        ({"mode": "wrong"}, 1, (UNPARSED, 0.0), (UNPARSED, 0.3)),
        ({"mode": "wrong"}, 1, (TIMEOUT, 0.0), (TIMEOUT, 0.0)),
        ({"mode": "calibrated"}, 1, (WRONG, 0.4), (WRONG, 0.43)),
        ({"mode": "calibrated"}, 1, (WRONG, 0.5), (WRONG, 0.5)),
        ({"mode": "calibrated"}, 1, (CORRECT, 0.9), (CORRECT, 0.9)),
        ({"mode": "calibrated"}, 1, (CRASH, 0.0), (CRASH, 0.0)),
    ],
)
def test_the_modes_of_the_pattern_reward(options: dict, step: int, before: tuple, after: tuple):
    status, score = changed("rpr", grade(*before), facts(completion=SIX_PHRASES, step=step), **options)
    assert (status, score) == (after[0], pytest.approx(after[1]))


def test_warm_up_and_its_steps_go_together():
    for options in ({"mode": "warmup"}, {"mode": "wrong", "warmup_steps": 3}):
        with pytest.raises(ConfigError, match="mode=warmup needs at least 1 step"):
            method(Kind.REWARDS, "rpr", **options)


# ---- several rules, and rules that fail -----------------------------------------------------------------------------


def rule(call, name: str = "mine:rule") -> Method:
    return Method(name, call, NoOptions())


def test_rules_act_one_after_the_other():
    rules = [method(Kind.REWARDS, "flips", rate=1.0), method(Kind.REWARDS, "overlong")]
    there, back = (apply_rules(grade(WRONG), facts(tokens=18_432), order) for order in (rules, rules[::-1]))
    assert (there.status, there.score) == (CORRECT, 0.5)
    assert (back.status, back.score) == (CORRECT, 1.5)  # 1 - (0 - 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda grade, facts, options: 1 / 0, "ZeroDivisionError: division by zero; correct the rule"),
        (lambda grade, facts, options: 0.5, "returned a float; return a Grade"),
        (lambda grade, facts, options: grade.with_score(math.nan), "returned the score nan; return a finite number"),
        (lambda grade, facts, options: grade.with_score(math.inf), "returned the score inf"),
        (lambda grade, facts, options: grade.with_score("1"), "returned the score '1'"),
    ],
)
def test_a_rule_that_fails_is_named(call, message: str):
    with pytest.raises(RewardRuleError, match=rf"reward.rules: mine:rule, on a rollout of row 0 in step 1: {message}"):
        apply_rules(grade(), facts(), [rule(call)])


def test_a_rule_that_cannot_work_is_refused_before_anything_is_sampled():
    try_rules([method(Kind.REWARDS, name) for name in ("flips", "overlong", "rpr")], PROMPTS[0], 6)
    with pytest.raises(ConfigError, match="exceeds rollout.max_response_length"):
        try_rules([method(Kind.REWARDS, "overlong", cache=7)], PROMPTS[0], 6)
    with pytest.raises(RewardRuleError, match="returned a NoneType"):
        try_rules([rule(lambda grade, facts, options: None)], PROMPTS[0], 6)


# ---- when they act in a step ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(toy: Toy) -> LocalEngine:
    engine = LocalEngine(str(toy.model), max_running_sequences=5)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(toy.model)
    engine.load_weights([(name, parameter.data) for name, parameter in model.named_parameters()], 3)
    return engine


def sampled(
    engine: LocalEngine, rules: Sequence[Method] = (), threshold: float | None = None, schedule: str = "streamed",
    correct: bool = False,
) -> list[Group]:  # fmt: skip
    rollout = RolloutConfig(prompts_per_step=3, rollouts_per_prompt=4, max_response_length=6, schedule=schedule)
    scheduler = RolloutScheduler(
        engine, Verdicts(lambda text: correct), lambda ids: str(list(ids)), rollout, LensConfig(), 11, Nothing(),
        rewarding=Rewarding(tuple(rules), threshold),
    )  # fmt: skip
    return scheduler.sample(step_prompts(PROMPTS, PURIFIED), step=2, version=3).groups


@pytest.mark.parametrize("schedule", ["speculative", "streamed", "sequential"])
def test_rules_and_threshold_act_before_it_is_decided_which_prompts_are_hard(engine: LocalEngine, schedule: str):
    def waves(*arguments: object, **options: object) -> list[int]:
        return [len(g.rescue) for g in sampled(engine, *arguments, schedule=schedule, **options)]

    flips = [method(Kind.REWARDS, "flips", rate=1.0)]
    assert waves() == [4, 0, 4] and waves(correct=True) == [0, 0, 0]
    assert waves(flips) == [0, 0, 0] and waves(flips, correct=True) == [4, 0, 4]
    assert waves((), -1.0) == [0, 0, 0] and waves((), 1.5, correct=True) == [4, 0, 4]


def test_every_schedule_gives_rules_the_same_facts(engine: LocalEngine):
    """What a rule is told of a rollout depends on its place, wave and number alone; both waves share a group's seed."""
    told: dict[str, dict] = {}

    def note(grade: Grade, facts: RolloutFacts, options: object) -> Grade:
        heard = (facts.prompt.index, facts.origin, facts.group_seed, facts.tokens, facts.finished, facts.completion)
        told[schedule][facts.rollout_seed] = heard
        assert (facts.step, facts.max_response_length) == (2, 6)
        return grade.with_score(random.Random(facts.rollout_seed).random())

    groups = {}
    for schedule in ("streamed", "sequential", "speculative"):
        told[schedule] = {}
        drawn = sampled(engine, [rule(note)], schedule=schedule)
        groups[schedule] = [[(r.token_ids, r.reward) for r in (*g.native, *g.rescue)] for g in drawn]
    assert groups["streamed"] == groups["sequential"] == groups["speculative"]
    assert told["streamed"] == told["sequential"] and told["speculative"].items() >= told["streamed"].items()
    heard = told["streamed"].values()
    assert len(heard) == 20 and len({(index, seed) for index, _, seed, *_ in heard}) == 3
    assert len({reward for group in groups["streamed"] for _, reward in group}) == 20


def test_the_threshold_sees_the_rewards_after_the_rules(engine: LocalEngine):
    half = rule(lambda grade, facts, options: grade.with_score(0.5 if facts.prompt.index else 0.4))
    groups = sampled(engine, [half], 0.5)
    assert [{r.status for r in g.native} for g in groups] == [{WRONG}, {CORRECT}, {CORRECT}]
    assert [len(g.rescue) for g in groups] == [4, 0, 0]


def test_the_threshold_and_a_rule_of_the_users_own_in_a_whole_run(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rules act in training only: with every verdict flipped, evaluations are those of the run without flips."""
    (tmp_path / "mine.py").write_text(
        "from lens_megatron.algorithms.entry import Entry\n"
        "from lens_megatron.reward import rows\n"
        "def mine(grade, facts, options):\n"
        "    assert rows.decode(facts.prompt.record).columns['answer']\n"
        "    return grade.with_score(0.25 + grade.score / 2)\n"
        "ENTRY = Entry(mine, paper='mine')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    common = {
        "data": {"eval": [str(toy.eval)]},
        "train": {"steps": 1, "eval_interval": 1, "save_interval": 1},
        "lens": {"enabled": False},
        "debug": {"rollout_only": True},
    }
    rules = {"rules": {"flips": {"rate": 1.0}, "mine:ENTRY": {}}}
    runs = {"plain": {}, "changed": {**rules, "success_threshold": 0.5}, "strict": {"success_threshold": 1.5}}
    found = {}
    for name, reward in runs.items():
        tree = toy.tree(tmp_path / name, **common, reward={"grader": "graders:compute_score", **reward})
        found[name] = launch(tree, tmp_path / f"{name}.d", 1)
    rows = {name: rollout_rows(tmp_path / name, 1) for name in found}
    assert {row["reward"] for row in rows["changed"]} == {0.25, 0.75}
    flipped = {1.0: 0.25, 0.0: 0.75}
    assert [flipped[row["reward"]] for row in rows["plain"]] == [row["reward"] for row in rows["changed"]]
    assert all((row["status"] == "correct") == (row["reward"] == 0.75) for row in rows["changed"])
    scores = [
        {k: v for row in metrics for k, v in row.items() if k.startswith("val-core/")} for metrics in found.values()
    ]
    assert scores[0] == scores[1] and any(scores[0].values())
    # No grader's score reaches this threshold.
    assert {row["status"] for row in rows["strict"]} == {"wrong"} and {*scores[2].values()} == {0.0}


def test_an_entry_of_the_users_own_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_rules.py").write_text(
        "from lens_megatron.algorithms.entry import Entry\n"
        "from lens_megatron.config import Section\n"
        "class BrevityOptions(Section):\n"
        "    limit: int = 200\n"
        "def brevity(grade, facts, options):\n"
        "    return grade.with_score(grade.score if facts.tokens <= options.limit else 0.0)\n"
        "BREVITY = Entry(brevity, paper='mine', options=BrevityOptions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert changed("own_rules:BREVITY", grade(CORRECT), facts(tokens=101), limit=100) == (CORRECT, 0.0)
    assert changed("own_rules:BREVITY", grade(CORRECT), facts(tokens=100), limit=100) == (CORRECT, 1.0)
