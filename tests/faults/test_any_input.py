"""Any input at all: what reads users' files raises its own error, with a message, or gives what it promises."""

import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_runs import Toy

from lens_megatron import config as configuration
from lens_megatron.config import Config, ConfigError, DataConfig, LensConfig
from lens_megatron.config.section import LARGEST_FLOAT, LARGEST_INTEGER
from lens_megatron.data.prompts import DataError, load_prompts
from lens_megatron.data.tokenizer import load_tokenizer
from lens_megatron.reward.types import GradeStatus
from lens_megatron.rollout import replay
from lens_megatron.rollout.replay import ReplayError
from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, Rollout

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), database=None)
REQUIRED = {"run": {"directory": "runs/a"}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
VOCABULARY = 500

numbers = (
    st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**31, 1e300, 1e-300, -0.0])
)
texts = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", " ", "~", "~/a", "~nobody/a", "\0", "\ud800", "n" * 300, "/" + "a/" * 3_000, "{{ x }}", "$x$", "../..", "a:b"]
)
scalars = st.none() | numbers | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
options = st.sampled_from(configuration.all_options())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@pytest.fixture(scope="module")
def tokenizer(toy: Toy):
    return load_tokenizer(str(toy.model), 10**6).hf


def check_config(call, *arguments: object) -> None:
    """A Config whose numbers are within bounds and that can be saved, or a ConfigError with a short message."""
    try:
        found = call(*arguments)
    except ConfigError as error:
        assert str(error).strip() and len(str(error)) < 50_000
        return
    assert isinstance(found, Config)
    for name in configuration.all_options():
        section, _, option = name.partition(".")
        value = getattr(getattr(found, section), option)
        assert not isinstance(value, float) or (math.isfinite(value) and abs(value) <= LARGEST_FLOAT), name
        assert not isinstance(value, int) or abs(value) <= LARGEST_INTEGER, name
    for path in (found.run.directory, found.model.path, found.data.train, *found.data.eval):
        assert path.strip() and "\0" not in path and not path.startswith("~")
    found.model_dump_json()


@FUZZ
@given(values=st.lists(st.tuples(options, anything), max_size=4))
def test_trees(values: list):
    tree: dict = {name: dict(section) for name, section in REQUIRED.items()}
    for name, value in values:
        section, _, option = name.partition(".")
        tree.setdefault(section, {})[option] = value
    check_config(configuration.from_tree, tree)


@FUZZ
@given(name=options, value=anything | texts, text=st.booleans())
def test_overrides(folder: Path, name: str, value: object, text: bool):
    path = folder / "config.yaml"
    path.write_text(json.dumps(REQUIRED))
    check_config(configuration.load, path, [f"{name}={value if text else json.dumps(value)}"])


pieces = st.sampled_from(
    [
        "&a ",
        "*a",
        "<<: ",
        "? ",
        ": ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\n",
        "  ",
        "|",
        '"',
        "'",
        "---\n",
        "base: ",
        "run: ",
    ]
    + ["lens:", "tau", "!!int ", "!!timestamp ", "!!set ", "1e999", "any.yaml", "other.yaml", ".", "\t", "#", "\ufeff"]
    + [json.dumps(REQUIRED)]
)


@FUZZ
@given(content=st.lists(pieces, max_size=14).map("".join).map(str.encode) | st.binary(max_size=80))
def test_yaml(folder: Path, content: bytes):
    (folder / "other.yaml").write_text("base: any.yaml\n")
    (folder / "any.yaml").write_bytes(content)
    check_config(configuration.load, folder / "any.yaml")


# ---- data ---------------------------------------------------------------------------------------------------------

rows = st.dictionaries(
    st.sampled_from(["problem", "prompt", "answer", "solution", "label", "reward_model", "data_source"]) | texts,
    anything | st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), max_size=3),
    max_size=4,
)


def check_data(path: Path, tokenizer, **data: object) -> None:
    """Prompts as promised, or a DataError that names the file."""
    try:
        loaded = load_prompts(str(path), tokenizer, DataConfig(train=str(path), **data), LensConfig())
    except DataError as error:
        assert path.name in str(error) and len(str(error)) < 10_000
        return
    for prompt in loaded.prompts:
        assert len(prompt.token_ids) == len(prompt.eligible) > 0 and not prompt.eligible[0]
        assert prompt.answer.strip() and prompt.problem.strip()
        prompt.source.encode()


@FUZZ
@given(
    content=st.lists(st.tuples(rows.map(json.dumps).map(str.encode) | st.binary(max_size=30), st.sampled_from(
        [b"\n", b"\r\n", b"\r", b"", b"\n\n", b"\x00", b"\xff\xfe"])), max_size=4),
    keys=st.tuples(st.none() | texts | st.just("answer"), st.none() | texts | st.just("problem")),
)  # fmt: skip
def test_json_lines(folder: Path, tokenizer, content: list, keys: tuple):
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(line + end for line, end in content))
    check_data(path, tokenizer, problem_key=keys[0], answer_key=keys[1])


@FUZZ
@given(cut=st.integers(0, 10_000), noise=st.binary(max_size=60), names=st.permutations(["problem", "answer", "answer"]))
def test_parquet(folder: Path, tokenizer, cut: int, noise: bytes, names: list):
    path = folder / "rows.parquet"
    columns = [["1 + 1 = ?"] * 3, ["2"] * 3]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=names[:2]), path)
    whole = path.read_bytes()
    cut %= len(whole)
    path.write_bytes(whole[:cut] + noise + whole[cut + len(noise) * (len(noise) % 2) :])
    check_data(path, tokenizer)


# ---- saved rollouts -----------------------------------------------------------------------------------------------


def saved() -> dict:
    native = Rollout((5, 6), (-0.5, -0.25), True, Origin.NATIVE, 0, 1.0, GradeStatus.CORRECT)
    rescued = Rollout((7,), (-0.5,), False, Origin.PURIFIED, 0, 0.0, GradeStatus.TIMEOUT)
    prompt = Prompt(0, (1, 2, 3), (False, True, True), "12", "5 + 7 = ?", "train")
    purified = PurifiedPrompt((1, 2), (2,), (0.0, 0.1, 0.2))
    return json.loads(replay.to_json(Group(prompt, (native,) * 2, purified, (rescued,) * 2)))


PLACES = [(), *((name,) for name in saved()), *(("prompt", name) for name in saved()["prompt"])]
PLACES += [("purified", name) for name in saved()["purified"]] + [("rescue", 1)]
PLACES += [("native", 0, name) for name in saved()["native"][0]] + [("prompt", "token_ids", 1)]


def check_replay(folder: Path, content: bytes) -> None:
    replay.replay_path(str(folder), 1).write_bytes(content)
    try:
        (group,) = replay.read_groups(str(folder), 1, count=1, vocab_size=VOCABULARY)
    except ReplayError as error:
        assert "step_000001.jsonl" in str(error) and len(str(error)) < 10_000
        return
    assert group.native and all(0 <= token < VOCABULARY for token in group.prompt.token_ids)
    for rollout in (*group.native, *group.rescue):
        assert len(rollout.token_ids) == len(rollout.log_probs) > 0 and math.isfinite(rollout.reward)
    assert replay.from_json(replay.to_json(group)) == group


@FUZZ
@given(place=st.sampled_from(PLACES), value=anything, twice=st.booleans())
def test_saved_rollouts(folder: Path, place: tuple, value: object, twice: bool):
    row = node = saved()
    for part in place[:-1]:
        node = node[part]
    if place:
        node[place[-1]] = value
    check_replay(folder, json.dumps(row if place else value).encode() + b"\n" * (1 + twice))


@FUZZ
@given(cut=st.integers(0, 10_000), noise=st.binary(max_size=20))
def test_saved_bytes(folder: Path, cut: int, noise: bytes):
    whole = json.dumps(saved()).encode()
    cut %= len(whole) + 1
    check_replay(folder, whole[:cut] + noise + whole[cut + len(noise) :])
