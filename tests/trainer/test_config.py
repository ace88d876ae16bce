"""One YAML file and overrides -> Config: bounds, the nearest names, and no other error than ConfigError."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lens_megatron.config import Config, ConfigError, all_options, check_world, from_tree, load, sections
from lens_megatron.config.files import differing_keys

ROOT = Path(__file__).resolve().parents[2]
BASE = "run: {directory: runs/a}\nmodel: {path: m}\ndata: {train: t.jsonl}\n"
REQUIRED = {"run": {"directory": "runs/a"}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}


@pytest.fixture
def base(tmp_path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(BASE)
    return path


def error(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


# ---- values -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_readings_of_the_paper(base):
    config = load(base)
    lens, algorithm = config.lens, config.algorithm
    assert (lens.tau, lens.deletion_ratio, lens.eligible, lens.gate) == (0.5, 0.03, "problem", "strict")
    assert (algorithm.advantage, algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef) == ("crpo", 0.2, 0.2, 1e-3)
    assert config.data.instruction == "Please reason step by step, and put your final answer within \\boxed{}."
    assert (config.rollout.rollouts_per_prompt, config.rollout.prompts_per_step) == (8, 128)


@pytest.mark.parametrize(
    ("override", "section", "option", "value"),
    [
        ("optimizer.lr=1e-6", "optimizer", "lr", 1e-6),  # YAML 1.1 reads it as text: no dot
        ("optimizer.lr=3", "optimizer", "lr", 3.0),
        (" train.steps = 7", "train", "steps", 7),
        ("algorithm.dual_clip=null", "algorithm", "dual_clip", None),
        ("algorithm.kl_limit=10", "algorithm", "kl_limit", 10.0),
        ("lens.enabled=no", "lens", "enabled", False),
        ("data.eval=[a.jsonl, b]", "data", "eval", ("a.jsonl", "b")),
        ('data.instruction=""', "data", "instruction", ""),
        ("lens.min_keep_failures=8", "lens", "min_keep_failures", 8),  # as many as rollouts
        ("run.directory=a=b", "run", "directory", "a=b"),
        ("megatron.transformer={a: {b: 1}}", "megatron", "transformer", {"a": {"b": 1}}),
        ("megatron.ddp.bucket_size=5", "megatron", "ddp", {"bucket_size": 5}),
    ],
)
def test_overrides(base, override, section, option, value):
    got = getattr(getattr(load(base, [override]), section), option)
    assert got == value and type(got) is type(value)


def test_the_last_override_counts_and_the_file_is_left_alone(base):
    assert load(base, ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert base.read_text() == BASE


def test_1e_minus_6_in_a_file(base):
    base.write_text(BASE + "optimizer: {lr: 1e-6, adam_eps: 1.0e-9}\n")
    assert (load(base).optimizer.lr, load(base).optimizer.adam_eps) == (1e-6, 1e-9)


def test_an_override_of_an_aliased_mapping_changes_one_place_only(base):
    base.write_text(BASE + "megatron: {transformer: &shared {a: 1}, ddp: *shared}\n")
    megatron = load(base, ["megatron.transformer.a=2"]).megatron
    assert (megatron.transformer, megatron.ddp) == ({"a": 2}, {"a": 1})


def test_a_section_without_options_is_the_default(base):
    base.write_text(BASE + "lens:\n  # tau: 0.3\ntrain:\n")
    assert load(base) == from_tree(REQUIRED)
    assert load(base, ["lens.tau=0.25"]).lens.tau == 0.25


def test_a_config_cannot_be_changed(base):
    config = load(base)
    with pytest.raises(ValueError, match="frozen"):
        config.lens.tau = 0.1


def test_a_saved_config_is_the_same_config(base):
    config = load(base, ["data.eval=[a]", "megatron.transformer.x=[1, 2]"])
    assert from_tree(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lens.tau=1.5", "lens.tau: 1.5: Input should be less than or equal to 1"),
        ("lens.tau=-0.1", "lens.tau: -0.1: Input should be greater than or equal to 0"),
        ("lens.deletion_ratio=0", "lens.deletion_ratio: 0: Input should be greater than 0"),
        ("lens.deletion_ratio=1", "lens.deletion_ratio: 1: Input should be less than 1"),
        ("algorithm.clip_low=1", "algorithm.clip_low: 1: Input should be less than 1"),
        ("algorithm.clip_high=-1", "algorithm.clip_high: -1: Input should be greater than or equal to 0"),
        ("algorithm.dual_clip=1", "algorithm.dual_clip: 1: Input should be greater than 1"),
        ("algorithm.kl_limit=0", "algorithm.kl_limit: 0: Input should be greater than 0"),
        ("rollout.prompts_per_step=0", "rollout.prompts_per_step: 0: Input should be greater than or equal to 1"),
        ("rollout.rollouts_per_prompt=0", "rollout.rollouts_per_prompt: 0: Input should be greater than or equal to 1"),
        ("train.save_interval=0", "train.save_interval: 0: Input should be greater than or equal to 1"),
        ("train.steps=-1", "train.steps: -1: Input should be greater than or equal to 0"),
        ("run.seed=2147483648", "run.seed: 2147483648: Input should be less than 2147483648"),
        ("rollout.temperature=0", "rollout.temperature: 0: Input should be greater than or equal to 0.001"),
        ("optimizer.lr=.inf", "optimizer.lr: inf: Input should be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr: nan: Input should be a finite number"),
        ("optimizer.lr=true", "optimizer.lr: True: expected a number"),
        ("train.steps=yes", "train.steps: True: expected a number"),
        ("megatron.expert_tensor_parallel_size=yes", "megatron.expert_tensor_parallel_size: True: expected a number"),
        ("algorithm.dual_clip=on", "algorithm.dual_clip: True: expected a number"),
        (
            "optimizer.lr=fast",
            "optimizer.lr: 'fast': Input should be a valid number, unable to parse string as a number",
        ),
        ("train.steps=1.5", "train.steps: 1.5: Input should be a valid integer, got a number with a fractional part"),
        ("lens.gate=maybe", "lens.gate: 'maybe': Input should be 'strict' or 'always'"),
        ("run.directory=5", "run.directory: 5: Input should be a valid string"),
        ("data.eval=a.jsonl", "data.eval: 'a.jsonl': expected a list such as [a, b]"),
        ("lens=3", "lens: 3: expected a section with options"),
        ("lens=[a]", "lens: ['a']: expected a section with options"),
        ("data.train=null", "data.train: None: Input should be a valid string"),
        ("data.instruction=", "data.instruction: None: Input should be a valid string"),
        ("model=null", "model: missing; it has no default"),
        ("model={}", "model.path: missing; it has no default"),
        ("lens.min_keep_failures=9", "lens.min_keep_failures (9) exceeds rollout.rollouts_per_prompt (8); lower it"),
        ("optimizer.min_lr=1", "optimizer.min_lr (1.0) exceeds optimizer.lr (1e-06); lower it"),
        (
            "train.updates_per_batch=3",
            "rollout.prompts_per_step (128) is not divisible by train.updates_per_batch (3); choose a divisor",
        ),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type(base, override, message):
    assert error(load, base, [override]) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.advantage=grpo", "rollout.rollouts_per_prompt=1"],
            "algorithm.advantage=grpo needs rollout.rollouts_per_prompt >= 2, got 1; raise it",
        ),
        (
            ["debug.rollout_only=true", "debug.load_rollouts=a"],
            "debug.rollout_only and debug.load_rollouts exclude each other; unset one",
        ),
        (["train.save_best_limit=1"], "train.save_best_limit compares evaluations; set data.eval or unset it"),
    ],
)
def test_options_that_exclude_each_other(base, overrides, message):
    assert error(load, base, overrides) == message


def test_every_mistake_is_listed(base):
    assert error(load, base, ["lens.tau=2", "train.step=1"]) == (
        "lens.tau: 2: Input should be less than or equal to 1\nunknown option train.step; did you mean train.steps?"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lens.taau", "unknown option lens.taau; did you mean lens.tau?"),
        ("modle", "unknown option modle; did you mean model?"),
        ("lr", "unknown option lr; did you mean optimizer.lr?"),
        ("optimizer.clip", "unknown option optimizer.clip; did you mean optimizer.clip_grad?"),
        ("lens.gamma", "unknown option lens.gamma; did you mean lens.gate?"),
        ("train.lr", "unknown option train.lr; did you mean optimizer.lr?"),
        ("rollout.temprature", "unknown option rollout.temprature; did you mean rollout.temperature?"),
        ("lens.temprature", "unknown option lens.temprature; did you mean rollout.temperature?"),
        (
            "zzz",
            "unknown option zzz; the file has: run, model, data, selection, rollout, reward, lens, algorithm, "
            "optimizer, train, megatron, vllm, cluster, debug",
        ),
        ("model.qqq", "unknown option model.qqq; model has: path, reference_path, dtype"),
    ],
)
def test_an_unknown_option_names_the_nearest(base, name, message):
    assert error(load, base, [f"{name}=1"]) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override 'train.steps': expected section.option=value"),
        ("=1", "override '=1': expected section.option=value"),
        ("train..steps=1", "override 'train..steps=1': expected section.option=value"),
        ("run.directory.x=1", "override 'run.directory.x=1': 'directory' is an option, not a section"),
        ("lens.tau=2024-99-99", "override 'lens.tau=2024-99-99': the value is not YAML: month must be in 1..12"),
    ],
)
def test_an_override_that_is_none(base, override, message):
    assert error(load, base, [override]) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected sections such as `model:` and `data:`, got NoneType"),
        (b"- 1", "expected sections such as `model:` and `data:`, got list"),
        (
            b"a: \xff",
            "cannot be read: 'utf-8' codec can't decode byte 0xff in position 3: invalid start byte; save it as UTF-8",
        ),
        (b"[" * 3000, "cannot be read as YAML: nested too deeply"),
        (b"a: 2024-99-99", "cannot be read as YAML: month must be in 1..12"),
        (b"a: !!int ''", "cannot be read as YAML: string index out of range"),
        (b"a: !!timestamp x", "cannot be read as YAML: 'NoneType' object has no attribute 'groupdict'"),
    ],
)
def test_a_file_that_is_no_configuration(base, content, message):
    base.write_bytes(content)
    assert error(load, base) == f"{base}: {message}"


def test_files_that_cannot_be_read(tmp_path):
    assert error(load, tmp_path / "no.yaml") == f"no configuration file at {tmp_path / 'no.yaml'}"
    assert error(load, tmp_path).startswith(f"{tmp_path}: cannot be read: ")


def test_yaml_tags_do_not_run_code(base):
    base.write_text("a: !!python/object/apply:os.system [exit]")
    assert "could not determine a constructor for the tag" in error(load, base)


def test_values_that_no_file_could_hold(base):
    """An alias to itself, or half a character: found now, not when the run writes its resolved configuration."""
    base.write_text(BASE + "megatron: {transformer: &x {again: *x}}\n")
    assert error(load, base).endswith("or an alias that names itself; write plain values")
    base.write_text(BASE + 'debug: {save_rollouts: "\\ud800"}\n')
    assert "half a character" in error(load, base)
    base.write_text(BASE + 'megatron: {transformer: {a: "\\ud800"}}\n')
    assert error(load, base).startswith("configuration: a value cannot be saved: ")
    base.write_text(BASE + "lens: &x {tau: *x}\n")
    assert error(load, base).endswith("or an alias that names itself; write plain values")


def test_a_message_stays_short_when_aliases_multiply(base):
    """Nine lines that stand for 9 ** 9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    base.write_text(BASE + "\n".join(lines) + "\nlens: *i\n")
    assert len(error(load, base)) < 2_000


# ---- the world and other runs -------------------------------------------------------------------------------------


def world(tensor=1, pipeline=1, prompts=128, updates=1) -> Config:
    return from_tree(
        {
            **REQUIRED,
            "megatron": {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
            "rollout": {"prompts_per_step": prompts},
            "train": {"updates_per_batch": updates},
        }
    )


def test_check_world():
    check_world(world(2, 2), 8)
    check_world(world(prompts=6, updates=3), 2)
    assert error(check_world, world(2, 3), 8) == (
        "world size 8 is not divisible by megatron.tensor_model_parallel_size (2) x "
        "megatron.pipeline_model_parallel_size (3) x megatron.context_parallel_size (1) = 6; start torchrun with a "
        "multiple of 6 processes or change the layout"
    )
    assert error(check_world, world(2, 1, prompts=12, updates=3), 6) == (
        "rollout.prompts_per_step (12) is not divisible by data-parallel size (3) x train.updates_per_batch (3); "
        "choose a multiple of 9"
    )


def test_differing_keys():
    old = {"lens": {"tau": 0.5, "gate": "strict"}, "run": {"seed": 0}, "a": None, "m": {"t": {"x": 1}}}
    new = {"lens": {"tau": 0.6, "gate": "strict"}, "run": {"seed": 0}, "m": {"t": {"x": 2, "y": None}}, "z": {}}
    assert differing_keys(old, new) == ["a", "lens.tau", "m.t.x", "m.t.y", "z"]
    assert differing_keys(old, old) == []


def test_the_number_of_own_options_stays_small():
    own = [name for name in all_options() if not name.startswith(("megatron.", "vllm."))]
    assert 70 <= len(own) <= 110
    assert len(set(all_options())) == len(all_options())
    assert {"run.directory", "lens.tau", "debug.rollout_only"} <= set(all_options())


def test_every_file_in_configs_loads():
    files = sorted((ROOT / "configs").glob("*.yaml"))
    if not files:
        pytest.skip("no configs yet")
    for file in files:
        load(file)


# ---- any input at all ---------------------------------------------------------------------------------------------

FUZZ = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck), database=None)
numbers = st.booleans() | st.integers() | st.floats()
scalars = st.none() | numbers | st.text(st.characters(), max_size=8) | st.dates() | st.binary(max_size=4)
names = st.sampled_from(
    [*REQUIRED, "lens", "megatron", "transformer", "tau", "eval", "lr", "seed", "directory", "train"]
)
keys = names | scalars
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
words = st.sampled_from(
    ["&a ", "*a", "<<: ", "!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "? ", ": ", "- ", "{", "}", "["]
    + [
        "]",
        ",",
        "\n",
        "  ",
        "|",
        ">",
        '"',
        "\\ud800",
        "'",
        "%YAML 1.2\n",
        "---\n",
        "1e999",
        "0b",
        "0x",
        "1:99",
        "=",
        "~",
    ]
    + ["lens", "tau", "megatron:", "transformer:", "2024-13-01", ".inf", ".nan", "_", "9" * 5000, BASE]
)
yaml_text = st.lists(words, max_size=15).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


def config_or_mistake(call, *arguments) -> None:
    """A Config that its run can save, or a ConfigError that says something."""
    try:
        config = call(*arguments)
    except ConfigError as mistake:
        assert str(mistake).strip()
        return
    assert isinstance(config, Config) and not math.isnan(config.optimizer.lr)
    config.model_dump_json()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "any.yaml"


@FUZZ
@given(content=yaml_text | yaml_text.map(lambda text: BASE + text))
def test_fuzz_files(path, content):
    path.write_text(content, encoding="utf-8")
    config_or_mistake(load, path)


@FUZZ
@given(content=st.binary(max_size=60))
def test_fuzz_bytes(path, content):
    path.write_bytes(content)
    config_or_mistake(load, path)


@FUZZ
@given(
    names=st.lists(st.sampled_from(all_options()) | st.text(max_size=8), min_size=1, max_size=3),
    value=yaml_text,
    free=st.lists(st.text(), max_size=1),
)
def test_fuzz_overrides(path, names, value, free):
    path.write_text(BASE)
    config_or_mistake(load, path, [*(f"{name}={value}" for name in names), *free])


@FUZZ
@given(tree=trees, wrap=st.sampled_from(["", "lens", "megatron", "data", "free"]))
def test_fuzz_trees(tree, wrap):
    if wrap == "free":
        tree = {**REQUIRED, "megatron": {"transformer": {"x": tree}}}
    elif wrap:
        tree = {**REQUIRED, wrap: tree}
    config_or_mistake(from_tree, tree)


@pytest.mark.parametrize("depth", [10, 900, 5_000, 100_000])
@pytest.mark.parametrize("section", ["lens", "megatron"])
def test_deep_trees(section, depth):
    deep: dict = {}
    for _ in range(depth):
        deep = {"transformer": deep}
    config_or_mistake(from_tree, {**REQUIRED, section: deep})


def test_vllm_options_pass_through_and_engines_take_whole_nodes(base):
    config = load(base, ["rollout.engine=vllm", "vllm.max_num_seqs=64"])
    assert config.vllm.model_dump() == {
        "tensor_parallel_size": 1, "gpu_memory_utilization": 0.6, "max_num_seqs": 64
    }  # fmt: skip
    check_world(config, 1)
    pairs = load(base, ["rollout.engine=vllm", "vllm.tensor_parallel_size=2", "rollout.prompts_per_step=12"])
    check_world(pairs, 4, 2)
    assert error(check_world, pairs, 3, 3).startswith("vllm.tensor_parallel_size (2) does not divide world size (3)")
    assert error(check_world, pairs, 6, 3) == (
        "vllm.tensor_parallel_size (2) does not divide the ranks of a node (3): consecutive ranks of one node hold an "
        "engine together; choose a divisor of 3"
    )
    check_world(load(base, ["vllm.tensor_parallel_size=2"]), 1)
    alone = load(base, ["rollout.engine=vllm_server", "rollout.share_work=false", "rollout.servers=2"])
    check_world(alone, 2)
    assert error(check_world, alone, 4).startswith("rollout.servers (2) are fewer than the ranks (4), and with")
    check_world(load(base, ["rollout.engine=vllm_server", "rollout.servers=2"]), 4)


@pytest.mark.parametrize(("engine", "shared"), [("local", False), ("vllm", False), ("vllm_server", True)])
def test_only_servers_share_one_queue_unless_it_is_asked_for(base, engine, shared):
    assert load(base, [f"rollout.engine={engine}"]).rollout.shares_work is shared
    for asked in (True, False):
        options = [f"rollout.engine={engine}", f"rollout.share_work={asked}"]
        assert load(base, options).rollout.shares_work is asked


def test_every_option_says_what_it_means_and_every_section_what_it_is_about():
    for name, section in sections().items():
        assert section.__doc__ and section.__doc__.strip().endswith("."), name
        for option, field in section.model_fields.items():
            meaning = field.description or ""
            assert meaning[:1].strip() and meaning.rstrip(")").endswith("."), f"{name}.{option}: {meaning!r}"


def test_second_waves_are_speculative_by_default(base):
    assert load(base).rollout.schedule == "speculative"


def test_servers_are_a_number_or_addresses(base):
    assert load(base, ["rollout.servers=3"]).rollout.servers == 3
    assert load(base, ["rollout.servers=[http://a:1, http://b:2]"]).rollout.servers == ("http://a:1", "http://b:2")
    for value in ("0", "yes", "1.5", "http://a:1"):
        assert "expected a number of servers, 1 to 1024, or a list" in error(load, base, [f"rollout.servers={value}"])
    for value in ("[]", "[https://a:1]", "[a:1]", "[http://a]", "[http://a:1, http://a:1]", "[http://a:1/v1]"):
        assert "expected different addresses such as [http://" in error(load, base, [f"rollout.servers={value}"])
