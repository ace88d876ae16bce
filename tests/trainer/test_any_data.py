"""Datasets of any content at all become well-formed prompts, or an error that names the file."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompt_data import (
    BOX,
    CHATML,
    GOOD,
    load,
    make_tokenizer,
    write_jsonl,
    write_parquet,
)

from lens_megatron.config import LensConfig
from lens_megatron.data.prompts import DataError

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow], database=None)
any_text = st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=12) | st.sampled_from(
    ["user", "system", "####", "a #### 3", "\\boxed{1}", "\\boxed{", "<|im_end|>", BOX, "\n"]
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(any_text, inner, max_size=3)
        | st.fixed_dictionaries({"role": inner, "content": inner})
        | st.fixed_dictionaries({"ground_truth": inner})
    ),
    max_leaves=6,
)
columns = st.sampled_from(
    ["problem", "question", "prompt", "answer", "solution", "label", "reward_model", "data_source"]
)
any_row = st.dictionaries(columns | any_text, any_json, max_size=5) | st.fixed_dictionaries(
    {"problem": any_text, "answer": any_json}
)


def loads_or_explains(path: Path, name: str, **options) -> None:
    """Prompts that are well-formed, or a DataError that names the file."""
    try:
        loaded = load(str(path), **options)
    except DataError as mistake:
        assert name in str(mistake)
        return
    for prompt in loaded.prompts:
        assert len(prompt.token_ids) == len(prompt.eligible) > 0 and not prompt.eligible[0]
        assert prompt.answer.strip() and prompt.problem.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


any_lines = st.lists(st.sampled_from([GOOD.encode(), b"\n", b"{", b"\x00", b"}", b"\xff"])).map(b"".join)


@FUZZ
@given(content=st.binary(max_size=200) | any_lines)
def test_fuzz_bytes(folder, content):
    (folder / "any.jsonl").write_bytes(content)
    loads_or_explains(folder / "any.jsonl", "any.jsonl")


@FUZZ
@given(content=st.binary(max_size=200), damage=st.integers(0, 10_000))
def test_fuzz_parquet_bytes(folder, content, damage):
    path = folder / "any.parquet"
    write_parquet(path, [{"problem": "How", "answer": "1"}] * 3)
    whole = path.read_bytes()
    at = damage % len(whole)
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])
    loads_or_explains(path, "any.parquet")


@FUZZ
@given(
    rows=st.lists(any_row, min_size=1, max_size=3), instruction=st.sampled_from(["", BOX]), system=any_text | st.none()
)
def test_fuzz_rows(folder, rows, instruction, system):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    system = None if system is None else system.encode("utf-8", "ignore").decode()
    loads_or_explains(folder / "rows.jsonl", "rows.jsonl", instruction=instruction, system_prompt=system)


@FUZZ
@given(problem=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), trim=st.booleans(), strip=st.booleans())
def test_eligible_tokens_spell_the_problem(folder, problem, trim, strip):
    """With spaces unprotected and no instruction, the eligible tokens are exactly the problem as the model reads it."""
    if not problem.strip() or "<|" in problem or "<s>" in problem:
        return
    source = write_jsonl(folder / "spell.jsonl", {"problem": problem, "answer": 1})
    tokenizer = TRIMMING[trim, strip]
    lens = LensConfig(protect_whitespace=False)
    (prompt,) = load(source, tokenizer=tokenizer, lens=lens, instruction="", max_prompt_length=10**6).prompts
    deletable = [t for t, go in zip(prompt.token_ids, prompt.eligible, strict=True) if go]
    assert tokenizer.decode(deletable) == (problem.strip() if strip else problem)


STRIPPED = CHATML.replace("m['content']", "m['content'] | trim")
TRIMMING = {
    (trim, strip): make_tokenizer(STRIPPED if strip else CHATML, trim)
    for trim, strip in itertools.product([False, True], repeat=2)
}
