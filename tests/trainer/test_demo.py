"""The demo's problems, tokenizer and model; that the model is worth training is what `make demo` shows."""

import dataclasses
import json
import random
import re
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_megatron.config import DataConfig, LensConfig
from lens_megatron.data.prompts import load_prompts
from lens_megatron.tools.demo import make as command
from lens_megatron.tools.demo.problems import Problem, distracted_solution, split_of, stream
from lens_megatron.tools.demo.tokenizer import train_tokenizer
from lens_megatron.tools.demo.warmup import WarmUp, encode

NOISE = {0: 1, 1: 1, 2: 1}
OPERATIONS = {"add": "+", "sub": "-", "mul": "*"}


def some(split: str, count: int, noise=NOISE) -> list[Problem]:
    return list(islice(stream(split, 0, noise), count))


def test_answers_are_what_the_operations_give_and_distractors_change_none():
    for problem in some("train", 500):
        expression = str(problem.numbers[0])
        for operation, number in zip(problem.kind.split("_"), problem.numbers[1:], strict=True):
            expression = f"({expression}){OPERATIONS[operation]}{number}"
        assert str(eval(expression)) == problem.answer and 1 <= int(problem.answer) <= 99
        assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}")
        kept = iter(re.findall(r"\w+", problem.problem))
        assert all(word in kept for word in re.findall(r"\w+", problem.core)), "a distractor replaced a word"
        assert (problem.problem == problem.core) == (problem.noise == 0)


def test_the_spans_of_distractors_are_what_the_clean_problem_lacks():
    for problem in some("train", 500):
        kept, end = "", 0
        for start, stop in problem.noise_spans:
            kept, end = kept + problem.problem[end:start], stop
        assert " ".join((kept + problem.problem[end:]).split()) == problem.core
        assert len(problem.noise_spans) == problem.noise and sorted(problem.noise_spans) == list(problem.noise_spans)
        marked = "".join(problem.problem[start:stop] for start, stop in problem.noise_spans)
        assert all(str(number) in marked for number in problem.stray_numbers)
        assert problem.problem.isprintable()


def test_the_problems_are_those_of_version_0_1():
    """Measurements on the demo can be compared over versions only while a seed gives the same problems."""
    text = "".join(f"{problem.problem}\n" for problem in some("train", 500))
    assert sha256(text.encode()).hexdigest() == "e2097d8213f6ab19b2ed87e08d6f3ab19df46259b7933c28c7d2e9c2a98e0edd"


def test_the_solution_shown_for_a_clean_and_a_distracted_problem():
    problem = next(p for p in some("train", 500, {2: 1}) if p.kind == "add" and p.stray_numbers)
    x, y = problem.numbers
    assert problem.solution == f"{x}+{y}={x + y}. \\boxed{{{x + y}}}"
    wrong = {distracted_solution(problem, random.Random(seed)) for seed in range(20)}
    stray = problem.stray_numbers
    assert wrong <= {f"{a}+{b}={a + b}. \\boxed{{{a + b}}}" for a in (x, *stray) for b in (y, *stray)} - {
        problem.solution
    }
    clean = next(iter(some("train", 1, {0: 1})))
    assert distracted_solution(clean, random.Random(0)) == clean.solution


def test_splits_share_nothing_and_seeds_repeat():
    train, held_out = some("train", 4000), some("eval", 256)
    assert len({p.problem for p in train}) == 4000 and not {p.problem for p in train} & {p.problem for p in held_out}
    core = {(p.kind, p.template, p.numbers) for p in train}
    assert not core & {(p.kind, p.template, p.numbers) for p in held_out}
    assert all(split_of(p.kind, p.template, p.numbers) == "eval" for p in held_out)
    assert some("train", 50) == some("train", 50)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(line for p in some("train", 300) for line in (command.chat_text(p), p.solution))


def test_chat_template_and_numbers(tokenizer):
    problem = some("train", 1, {0: 1})[0]
    prompt, completion = encode(problem, problem.solution, tokenizer)
    assert tokenizer.decode(prompt) == (
        f"<|im_start|>user\n{problem.problem}\nAnswer in \\boxed{{}}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(completion) == problem.solution + "<|im_end|>"
    assert all(len(tokenizer.encode(str(n))) == 1 for n in range(100))


def test_any_text_round_trips(tokenizer):
    @settings(max_examples=100, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def check(text: str) -> None:
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_making_it_is_all_or_nothing_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "TRAIN_PROBLEMS", 20)
    monkeypatch.setattr(command, "EVAL_PROBLEMS", 4)
    options = WarmUp(steps=2, batch=4, problems=100)
    folder = tmp_path / "demo"
    with monkeypatch.context() as broken:
        broken.setattr(command, "warm_up", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.make(folder, options)
    assert list(tmp_path.iterdir()) == []
    assert command.make(folder, options) and not command.make(folder, options)
    AutoModelForCausalLM.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token == "<|im_end|>"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and rows[0].keys() >= {"problem", "answer"}
    data = DataConfig(train=str(folder / "train.jsonl"), noise_key="noise")
    loaded = load_prompts(data.train, AutoTokenizer.from_pretrained(folder / "model"), data, LensConfig())
    assert [bool(row["noise"]) for row in rows] == [any(prompt.noise) for prompt in loaded.prompts]
    written = [(folder / name).read_bytes() for name in ("train.jsonl", "eval.jsonl")]
    for name in ("train.jsonl", "eval.jsonl"):  # as version 0.1 wrote it
        old = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        (folder / name).write_text("".join(json.dumps(row | {"noise": len(row["noise"])}) + "\n" for row in old))
    before = sorted(folder.iterdir())
    assert not command.make(folder, options) and sorted(folder.iterdir()) == before
    assert [(folder / name).read_bytes() for name in ("train.jsonl", "eval.jsonl")] == written
    measured = json.loads((folder / "demo.json").read_text())
    assert 1e6 < measured["parameters"] < 4e6 and measured["warm_up"]["steps"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="does not hold a demo"):
        command.make(tmp_path / "mine", dataclasses.replace(options))
