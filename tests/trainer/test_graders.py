"""Reward functions of the user's own: what they are given, what they may return, and several at once."""

import datetime
import decimal
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_data import GOOD, error, load, make_tokenizer, write_jsonl, write_parquet

from lens_megatron.config import DataConfig, LensConfig, RewardConfig
from lens_megatron.data.prompts import load_prompts
from lens_megatron.reward import AnswerFacts, Grade, GraderPool, GradeStatus, frames, grade, rows
from lens_megatron.reward.registry import GraderSet, choose
from lens_megatron.reward.types import Submission
from lens_megatron.rollout.engine import Completion
from lens_megatron.rollout.rewarding import answer_facts
from lens_megatron.types import Prompt

CORRECT, WRONG, UNPARSED = GradeStatus.CORRECT, GradeStatus.WRONG, GradeStatus.UNPARSED
TIMEOUT, CRASH = GradeStatus.TIMEOUT, GradeStatus.CRASH
LIMIT_S = 60.0

MODULE = """
import asyncio, json, time
from pathlib import Path

def note(**given):
    with Path(__file__).with_name("seen.jsonl").open("a") as file:
        file.write(json.dumps(given, default=lambda value: "a function") + "\\n")

def verl(data_source, solution_str, ground_truth, extra_info):
    note(data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info)
    return {"score": 0.25, "acc": True}

def verl_of_three(data_source, solution_str, ground_truth):
    return float(solution_str == ground_truth)

def verl_of_all(solution_str, **others):
    note(**others)
    return 0.0

def trl(prompts, completions, completion_ids, **columns):
    note(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
    return [0.5]

def trl_of_two(completions, level):
    return [float(level[0])]

async def slowly(completions, **columns):
    await asyncio.sleep(0.001)
    return [float(len(completions[0]))]

async def slowly_verl(solution_str, **others):
    loop = asyncio.get_running_loop()
    if not hasattr(slowly_verl, "loop"):
        slowly_verl.loop = loop
    return float(slowly_verl.loop is loop)

def sometimes(completions, kind=("other",), **columns):
    return [1.0 if kind == ["mine"] else None]

def length(completions, **columns):
    return [float(len(completions[0]))]

def misbehaves(solution_str, **others):
    if solution_str == "hang":
        time.sleep(600)
    raise KeyError(solution_str)
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the functions of the module `mine` write down what they were given."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "seen.jsonl"


def whole(source: str, **data: object) -> Sequence[Prompt]:
    config = DataConfig(train=source, instruction="Box it.", **data)
    return load_prompts(source, make_tokenizer(), config, LensConfig(), whole_rows=True).prompts


def facts_of(prompt: Prompt, tokens: tuple[int, ...] = (7, 8)) -> AnswerFacts:
    return answer_facts(prompt, Completion(0, tokens, (0.0,) * len(tokens), True, 0))


def given_to(name: str, prompts: Sequence[Prompt], seen: Path, completion: str = "So 12.") -> list[dict]:
    grades = grade(
        [completion] * len(prompts), [p.answer for p in prompts], LIMIT_S, workers=1, grader=f"mine:{name}",
        facts=[facts_of(prompt) for prompt in prompts],
    )  # fmt: skip
    assert all(found.status is not CRASH for found in grades), grades
    return [json.loads(line) for line in seen.read_text().splitlines()]


# ---- what functions are given ---------------------------------------------------------------------------------------


def test_verls_functions_get_the_row_as_verl_gives_it(seen: Path, tmp_path: Path):
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "How"}], "ability": "math",
         "reward_model": {"style": "rule", "ground_truth": "1,200 "}, "extra_info": {"split": "train", "index": 3}},
        {"problem": "How", "answer": 12, "level": "\ud800"},
        {"problem": "How", "reward_model": {"ground_truth": {"target": ["a", "b"]}}},
    )  # fmt: skip
    first, second, third = given_to("verl", whole(source), seen)
    assert first == {
        "data_source": "openai/gsm8k", "solution_str": "So 12.", "ground_truth": "1,200 ",
        "extra_info": {"split": "train", "index": 3},
    }  # fmt: skip
    assert (second["data_source"], second["ground_truth"]) == ("rows", "12")
    assert second["extra_info"] == {"problem": "How", "answer": 12, "level": "\ud800"}
    assert third["ground_truth"] == {"target": ["a", "b"]}


def test_verls_functions_get_only_the_parameters_they_have(seen: Path, tmp_path: Path):
    prompts = whole(write_jsonl(tmp_path / "rows.jsonl", {"problem": "How", "answer": "1"}))
    (found,) = grade(["1"], ["1"], LIMIT_S, grader="mine:verl_of_three", facts=[facts_of(prompts[0])])
    assert found.correct
    (others,) = given_to("verl_of_all", prompts, seen)
    assert others.keys() == {"data_source", "ground_truth", "extra_info"}


def test_trls_functions_get_conversations_as_messages_and_text_as_text(seen: Path, tmp_path: Path):
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        {"problem": "How", "answer": "the sum #### 12", "level": 3},
        {"prompt": [{"role": "user", "content": "How"}], "solution": r"\boxed{12}", "completion_ids": [1]},
    )
    plain, chat = given_to("trl", whole(source, system_prompt="Be brief."), seen)
    assert plain["prompts"] == ["How"] and plain["completions"] == ["So 12."]
    assert plain["completion_ids"] == chat["completion_ids"] == [[7, 8]]
    logging = {"log_extra": "a function", "log_metric": "a function"}
    assert plain["columns"] == {"problem": ["How"], "answer": ["the sum #### 12"], "level": [3], **logging}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How"}]
    assert chat["prompts"] == [messages]
    assert chat["completions"] == [[{"role": "assistant", "content": "So 12."}]]
    # A column that the row lacks is there as the answer that was read; those that the trainer fills are not passed on.
    assert chat["columns"] == {"solution": [r"\boxed{12}"], "answer": ["12"], **logging}


def test_trls_functions_get_only_the_parameters_they_have(seen: Path, tmp_path: Path):
    prompts = whole(write_jsonl(tmp_path / "rows.jsonl", {"problem": "How", "answer": "1", "level": 3, "other": 4}))
    (found,) = grade(["x"], ["1"], LIMIT_S, grader="mine:trl_of_two", facts=[facts_of(prompts[0])])
    assert (found.score, found.status) == (3.0, CORRECT)


def test_values_that_json_cannot_hold_become_text_numbers_or_null(tmp_path: Path):
    source = write_parquet(
        tmp_path / "rows.parquet",
        [{"problem": "How", "answer": "1", "image": b"\x89PNG", "day": datetime.date(2026, 1, 31),
          "at": datetime.datetime(2026, 1, 31, 12, 30), "took": datetime.timedelta(seconds=1.5),
          "price": decimal.Decimal("2.50"), "nested": {"scores": [1.0, None], "image": {"bytes": b"x", "path": "p"}}}],
    )  # fmt: skip
    (prompt,) = whole(source)
    columns = rows.decode(prompt.record).columns
    assert columns == {
        "problem": "How", "answer": "1", "image": None, "day": "2026-01-31", "at": "2026-01-31T12:30:00", "took": 1.5,
        "price": 2.5, "nested": {"scores": [1.0, None], "image": {"bytes": None, "path": "p"}},
    }  # fmt: skip
    row = rows.DataRow((), False, None, {"array": np.arange(3), "number": np.float32(0.5), "object": object()})
    assert rows.decode(rows.encode(row)).columns == {"array": [0, 1, 2], "number": 0.5, "object": None}


def test_rows_that_cannot_be_given_to_graders_are_named(tmp_path: Path):
    two = pyarrow.table([["How"], ["1"], ["a"], ["b"]], names=["problem", "answer", "level", "level"])
    pyarrow.parquet.write_table(two, tmp_path / "two.parquet")
    assert "2 columns are called 'level'; rename them" in error(whole, str(tmp_path / "two.parquet"))
    load(str(tmp_path / "two.parquet"))  # nobody reads that column


def test_rows_travel_only_where_somebody_reads_them(tmp_path: Path):
    source = tmp_path / "rows.jsonl"
    source.write_text(GOOD + "\n")
    (prompt,) = load(str(source)).prompts
    assert prompt.record == "" and facts_of(prompt).token_ids == ()
    assert not RewardConfig().needs_rows and not RewardConfig(grader=("math_verify",)).needs_rows
    for reward in ({"grader": "a:b"}, {"grader": ["math_verify", "a:b"]}, {"rules": {"flips": {}}}):
        assert RewardConfig(**reward).needs_rows


# ---- what they may return -------------------------------------------------------------------------------------------


def test_functions_may_be_async_and_keep_one_event_loop(seen: Path):
    assert [g.score for g in grade(["abc", "x"], ["", ""], LIMIT_S, workers=1, grader="mine:slowly")] == [3.0, 1.0]
    assert [g.score for g in grade(["a", "b"], ["", ""], LIMIT_S, workers=1, grader="mine:slowly_verl")] == [1.0, 1.0]


def test_a_score_of_none_leaves_the_row_to_the_other_graders(seen: Path, tmp_path: Path):
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        {"problem": "How", "answer": "1", "kind": "mine"},
        {"problem": "How", "answer": "1", "kind": "theirs"},
    )
    facts = [facts_of(prompt) for prompt in whole(source)]

    def graded(*graders: str) -> list[tuple[GradeStatus, float]]:
        found = grade(["2", "2"], ["1", "1"], LIMIT_S, workers=1, grader=graders, weights=[10.0, 0.5][: len(graders)],
                      facts=facts)  # fmt: skip
        return [(g.status, g.score) for g in found]

    # The first grader that applies decides: length 1 is a score of 1, which counts as correct.
    assert graded("mine:sometimes", "mine:verl_of_three") == [(CORRECT, 10.0), (WRONG, 0.0)]
    assert graded("mine:sometimes", "mine:length") == [(CORRECT, 10.5), (CORRECT, 0.5)]
    assert graded("mine:sometimes") == [(CORRECT, 10.0), (CRASH, 0.0)]


# ---- several graders ------------------------------------------------------------------------------------------------


def test_scores_of_several_graders_are_added_and_the_first_one_judges(seen: Path):
    def graded(*graders: str, weights: Sequence[float] = ()) -> list[tuple[GradeStatus, float]]:
        found = grade([r"\boxed{2/4}", r"\boxed{3}", "no"], ["1/2"] * 3, LIMIT_S, grader=graders, weights=weights)
        return [(g.status, g.score) for g in found]

    assert graded("math_verify", "mine:length") == [(CORRECT, 12.0), (WRONG, 9.0), (UNPARSED, 2.0)]
    weighted = graded("math_verify", "mine:length", weights=(2.0, -0.5))
    assert weighted == [(CORRECT, 2 - 5.5), (WRONG, -4.5), (UNPARSED, -1.0)]
    assert graded("mine:length", "math_verify", weights=(0.0, 1.0)) == [(CORRECT, 1.0), (CORRECT, 0.0), (CORRECT, 0.0)]
    assert graded("math_verify", weights=(3.0,)) == [(CORRECT, 3.0), (WRONG, 0.0), (UNPARSED, 0.0)]


def test_a_crash_or_a_timeout_of_any_grader_is_that_of_the_answer(seen: Path):
    graders = ("math_verify", "mine:misbehaves")
    crash, timeout = grade(["no", "hang"], ["1", "1"], 2.0, workers=1, grader=graders)
    assert (crash.status, crash.score, timeout.status, timeout.score) == (CRASH, 0.0, TIMEOUT, 0.0)
    assert crash.detail == "RuntimeError: mine:misbehaves: KeyError: 'no'"


def test_equal_pairs_share_a_verdict_only_where_nothing_else_decides(seen: Path, tmp_path: Path):
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        {"problem": "How", "answer": "1", "level": 2},
        {"problem": "How", "answer": "1", "level": 5},
    )
    facts = [facts_of(prompt) for prompt in whole(source)]
    found = grade([r"\boxed{1}"] * 2, ["1"] * 2, LIMIT_S, workers=1, grader=("math_verify", "mine:trl_of_two"),
                  facts=facts)  # fmt: skip
    assert [g.score for g in found] == [3.0, 6.0]


@pytest.mark.parametrize(
    ("grader", "weights", "message"),
    [
        (
            ("math_verify", "a:b"),
            (1.0,),
            r"reward.weights has 1 numbers for 2 graders \(reward.grader=math_verify, a:b",
        ),
        ("math_verify", (1.0, 2.0), "reward.weights has 2 numbers for 1 graders"),
        ("math_verify", (float("nan"),), r"reward.weights \[nan\]: give finite numbers"),
        ((), (), "reward.grader: the list is empty"),
        (("math_verify", "math_verfy"), (), "unknown grader 'math_verfy'; did you mean math_verify"),
    ],
)
def test_graders_that_cannot_be_used_are_named_before_any_process_starts(grader, weights, message: str):
    with pytest.raises(ValueError, match=message):
        GraderPool(1, LIMIT_S, grader, weights)


def test_facts_must_be_as_many_as_completions():
    with pytest.raises(ValueError, match="2 completions for 1 facts"):
        grade(["a", "b"], ["a", "b"], facts=[AnswerFacts()])


# ---- the success threshold and the frames ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "score", "threshold", "judged"),
    [
        (CORRECT, 0.2, None, CORRECT), (WRONG, 0.9, None, WRONG),
        (WRONG, 0.5, 0.5, CORRECT), (UNPARSED, 0.6, 0.5, CORRECT), (CORRECT, 0.4, 0.5, WRONG),
        (WRONG, 0.4, 0.5, WRONG), (UNPARSED, 0.4, 0.5, UNPARSED),
        # A score of 0 that stands for no answer is no success, however low the threshold.
        (TIMEOUT, 0.0, -1.0, TIMEOUT), (CRASH, 0.0, -1.0, CRASH), (CRASH, 0.0, 0.5, CRASH),
    ],
)  # fmt: skip
def test_the_success_threshold(status: GradeStatus, score: float, threshold: float | None, judged: GradeStatus):
    found = Grade(status, score, 0.1, "x", "y").judged(threshold)
    assert found == Grade(judged, score, 0.1, "x", "y")


@given(st.text(st.characters()), st.text(), st.text(), st.lists(st.integers(0, 2**31)))
def test_frames_come_back_as_they_were(completion: str, answer: str, record: str, tokens: list[int]):
    sent = Submission(completion, answer, AnswerFacts("s", record, tuple(tokens)))
    grade = Grade(UNPARSED, -0.1, 1.5, completion, answer)
    bodies, left = frames.split(frames.encode(sent) + frames.encode(grade) + b"\x05\0\0\0rest")
    assert frames.decode_submission(bodies[0]) == sent and frames.decode_grade(bodies[1]) == grade
    assert len(bodies) == 2 and left == b"\x05\0\0\0rest"


def test_the_graders_of_a_run_travel_as_an_argument():
    chosen = choose(["math_verify", "a:b"], [0.1, 2])
    assert GraderSet.from_argument(chosen.to_argument()) == chosen
