"""Every configuration in the tree loads, holds the paper's hyper-parameters, fits its cluster, and builds exactly."""

import json
from pathlib import Path

import pytest
import yaml
from toy_runs import ROOT, run_ranks

from lens_megatron import config as configuration
from lens_megatron.config import Config
from lens_megatron.config.files import differing_keys, merge, read_tree
from lens_megatron.tools.planning.hardware import GIB, gib
from lens_megatron.tools.planning.layout import LayerSpec
from lens_megatron.tools.planning.model_shape import read_shape
from lens_megatron.tools.planning.plan import make_plan

PATHS = sorted(path for folder in ("a800x8", "a800x64") for path in (ROOT / "configs" / folder).glob("*.yaml"))
LENS = [path for path in PATHS if path.name.startswith("lens_")]
PUBLISHED = {
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-4B-Base": 4_022_468_096,
    "Qwen3-8B-Base": 8_190_735_360,
}
"""Parameters, as the model cards and weight files have them; a tied head counts once."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_a_lens_and_a_grpo_file_for_every_model_and_machine():
    small = {"llama3.2-3b-instruct", "qwen2.5-3b", "qwen2.5-7b", "qwen3-4b-base", "qwen3-8b-base"}
    wanted = {("a800x8", name) for name in small} | {("a800x64", "qwen2.5-7b"), ("a800x64", "qwen2.5-32b")}
    for method in ("lens", "grpo"):
        found = {(p.parent.name, p.stem.partition("_")[2]) for p in PATHS if p.name.startswith(method)}
        assert found == wanted


@pytest.mark.parametrize("path", PATHS, ids=relative)
def test_it_holds_the_papers_hyper_parameters(path):
    config: Config = configuration.load(path)
    rollout, algorithm = config.rollout, config.algorithm
    assert (rollout.prompts_per_step, rollout.rollouts_per_prompt, rollout.temperature) == (128, 8, 1.0)
    assert (config.data.max_prompt_length, rollout.max_response_length) == (512, 4096)
    assert (config.optimizer.lr, algorithm.kl_coef, algorithm.entropy_coef) == (1e-6, 1e-3, 0.0)
    assert (algorithm.clip_low, algorithm.clip_high, config.train.updates_per_batch) == (0.2, 0.2, 1)
    lens = path.name.startswith("lens_")
    assert config.lens.enabled is lens and algorithm.advantage == ("crpo" if lens else "grpo")
    assert config.lens.tau == 0.5 and 0.01 <= config.lens.deletion_ratio <= 0.05
    assert config.run.directory == f"runs/{path.stem}_{path.parent.name}"


@pytest.mark.parametrize("path", LENS, ids=relative)
def test_its_grpo_baseline_differs_in_nothing_else(path):
    baseline = configuration.load(path.with_name(path.name.replace("lens_", "grpo_")))
    assert differing_keys(configuration.load(path).model_dump(), baseline.model_dump()) == [
        "algorithm.advantage", "lens.enabled", "run.directory"
    ]  # fmt: skip


@pytest.mark.parametrize("spec", [LayerSpec.TRANSFORMER_ENGINE, LayerSpec.LOCAL])
@pytest.mark.parametrize("path", PATHS, ids=relative)
def test_it_fits_its_cluster_with_and_without_transformer_engine(path, spec):
    plan = make_plan(configuration.load(path), spec)
    assert not plan.mistakes
    assert (plan.layout.engine, plan.layout.offload) == ("vllm", True)
    assert plan.shape.parameters == PUBLISHED[Path(configuration.load(path).model.path).name]
    assert plan.running >= 16


@pytest.mark.parametrize("path", LENS, ids=relative)
def test_its_micro_batch_is_the_largest_that_leaves_ten_gib_free_in_the_update(path):
    def free(tokens: int) -> float:
        plan = make_plan(configuration.load(path, [f"train.max_tokens_per_micro_batch={tokens}"]))
        update = next(phase for phase in plan.phases if phase.phase == "update")
        return (plan.cluster.memory_bytes - update.total) / GIB

    config = configuration.load(path)
    sample = config.data.max_prompt_length + config.rollout.max_response_length
    tokens = config.train.max_tokens_per_micro_batch
    assert tokens % sample == 0 and free(tokens) >= 10 > free(tokens + sample)


@pytest.mark.parametrize("path", LENS, ids=relative)
def test_the_readme_says_what_the_plan_says(path):
    plan = make_plan(configuration.load(path))
    gpu = {phase.phase: gib(phase.total) for phase in plan.phases}
    cache = next(phase.kv_cache for phase in plan.phases if phase.phase == "rollout")
    seconds = {time.phase: time.seconds for time in plan.times}
    row = [f"`{path.parent.name}/{path.stem}`", gpu["weight sync"], gpu["rollout"], gib(cache), str(plan.running)]
    row += [gpu["update"], gib(plan.host.total), f"{seconds['rollout']:.0f}", f"{sum(seconds.values()):.0f}"]
    assert f"| {' | '.join(row)} |" in (ROOT / "configs" / "README.md").read_text()


def test_training_takes_every_one_and_the_readme_names_it():
    readme = (ROOT / "configs" / "README.md").read_text()
    for path in PATHS:
        config = configuration.load(path)
        assert f"{path.parent.name}/{{lens,grpo}}_{path.stem.partition('_')[2]}.yaml" in readme
        configuration.check_world(
            config, config.cluster.nodes * config.cluster.gpus_per_node, config.cluster.gpus_per_node
        )


def test_no_option_is_said_twice():
    for path in LENS:
        tree = yaml.safe_load(path.read_text())
        bases = tree.pop("base")
        below: dict = {}
        for base in bases:
            below = merge(below, read_tree(path.parent / base))
        assert merge(below, tree) != below
        for section, options in tree.items():
            for option, value in options.items():
                assert below.get(section, {}).get(option) != value, (
                    f"{relative(path)}: {section}.{option} is the base's"
                )


def test_its_model_builds_without_memory_at_the_exact_parameter_count():
    result = run_ranks(1, Path(__file__).with_name("meta_models.py"), *LENS)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    whole = {Path(name).name: count for name, stage, count in rows if stage is None}
    assert whole == PUBLISHED
    stages = [row for row in rows if row[1] is not None]
    assert len(stages) == len(LENS) + 1  # two pipeline stages at 32B
    for path, stage, count in stages:
        config = configuration.load(path)
        tp, pp = config.megatron.tensor_model_parallel_size, config.megatron.pipeline_model_parallel_size
        assert read_shape(config.model.path).stage_parameters(tp, pp, stage) == count
