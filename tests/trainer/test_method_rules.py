"""Options of methods that do not go together are refused, with both values and the remedy."""

import pytest

from lens_megatron.config import ConfigError, from_tree
from lens_megatron.config.files import apply_override

REQUIRED = {"run": {"directory": "runs/a"}, "model": {"path": "model"}, "data": {"train": "train.jsonl"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["lens.enabled=false", "rollout.rollouts_per_prompt=1"],
            "algorithm.advantage=crpo needs rollout.rollouts_per_prompt >= 2, got 1; raise it",
        ),
        (
            [
                "lens.enabled=false",
                "rollout.rollouts_per_prompt=1",
                "selection.method=greso",
                "algorithm.advantage=m:e",
            ],
            "selection.method=greso keeps groups with both successes and failures, and a group of "
            "rollout.rollouts_per_prompt=1 never has both; raise it, or set selection.method=every_prompt",
        ),
        (
            ["lens.purifier=oracle"],
            "lens.purifier=oracle deletes what the data marks as noise, and data.noise_key is empty; name the column "
            "that holds the noise's [start, end) characters, or choose another purifier",
        ),
        (
            ["lens.enabled=false", "algorithm.imitation_coef=0.1"],
            "algorithm.imitation_coef (0.1) weighs successes from purified prompts, lens.enabled=false has none; set "
            "it to 0",
        ),
        (
            ["algorithm.rescued_ratio_floor=0.5", "algorithm.rescued_ratio=original_prompt"],
            "algorithm.rescued_ratio_floor (0.5) raises ratios against the purified prompt, "
            "algorithm.rescued_ratio=original_prompt has none; set the floor to 0, or choose generation_prompt",
        ),
        (
            ["lens.enabled=false", "algorithm.rescued_ratio_floor=0.5"],
            "algorithm.rescued_ratio_floor (0.5) raises ratios of responses to purified prompts, lens.enabled=false "
            "has none; set it to 0",
        ),
        (
            ["lens.enabled=false", "algorithm.rescued_ratio=original_prompt"],
            "algorithm.rescued_ratio=original_prompt is about responses to purified prompts, lens.enabled=false has "
            "none; choose generation_prompt",
        ),
        (
            ["lens.enabled=false", "algorithm.weights_scope=purified_only"],
            "algorithm.weights_scope=purified_only weighs groups with a second wave, lens.enabled=false has none; "
            "choose all, or algorithm.weights=none",
        ),
        (
            ["reward.grader=[math_verify, a:b]", "reward.weights=[1, 2, 3]"],
            "reward.weights has 3 numbers for 2 graders (reward.grader=math_verify, a:b); give one for each, or leave "
            "it empty",
        ),
    ],
)
def test_options_that_exclude_each_other(overrides: list[str], message: str):
    tree = dict(REQUIRED)
    for override in overrides:
        apply_override(tree, override)
    with pytest.raises(ConfigError) as refused:
        from_tree(tree)
    assert str(refused.value) == message
