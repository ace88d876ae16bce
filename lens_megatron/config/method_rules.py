"""Checks rules between the options of methods. Every message names both values and the remedy."""

from collections.abc import Iterator

from lens_megatron.config.options import Config
from lens_megatron.reward import registry

GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo")
"""Advantages that compare a rollout with others of its prompt, so that a rollout alone has none."""
MIXED_GROUPS = ("dynamic_sampling", "greso")
"""Selections that keep a group only if it has both successes and failures."""


def mistakes(config: Config) -> Iterator[str]:
    """Returns what does not go together among methods and the options that they read."""
    yield from _about_groups(config)
    yield from _about_purification(config)
    try:
        registry.choose(config.reward.grader, config.reward.weights)
    except ValueError as error:
        yield str(error)


def _about_groups(config: Config) -> Iterator[str]:
    rollouts, advantage, method = (
        config.rollout.rollouts_per_prompt,
        config.algorithm.advantage,
        config.selection.method,
    )
    if rollouts > 1:
        return
    if advantage in GROUP_ADVANTAGES or (advantage == "crpo" and not config.lens.enabled):
        yield f"algorithm.advantage={advantage} needs rollout.rollouts_per_prompt >= 2, got 1; raise it"
    if method in MIXED_GROUPS and not config.lens.enabled:
        yield (
            f"selection.method={method} keeps groups with both successes and failures, and a group of "
            "rollout.rollouts_per_prompt=1 never has both; raise it, or set selection.method=every_prompt"
        )


def _about_purification(config: Config) -> Iterator[str]:
    lens, algorithm = config.lens, config.algorithm
    if lens.enabled and lens.purifier == "oracle" and config.data.noise_key is None:
        yield (
            "lens.purifier=oracle deletes what the data marks as noise, and data.noise_key is empty; name the column "
            "that holds the noise's [start, end) characters, or choose another purifier"
        )
    if algorithm.rescued_ratio_floor and algorithm.rescued_ratio == "original_prompt":
        yield (
            f"algorithm.rescued_ratio_floor ({algorithm.rescued_ratio_floor:g}) raises ratios against the purified "
            "prompt, algorithm.rescued_ratio=original_prompt has none; set the floor to 0, or choose generation_prompt"
        )
    if lens.enabled:
        return
    if algorithm.rescued_ratio_floor:
        yield (
            f"algorithm.rescued_ratio_floor ({algorithm.rescued_ratio_floor:g}) raises ratios of responses to purified "
            "prompts, lens.enabled=false has none; set it to 0"
        )
    if algorithm.rescued_ratio != "generation_prompt":
        yield (
            f"algorithm.rescued_ratio={algorithm.rescued_ratio} is about responses to purified prompts, "
            "lens.enabled=false has none; choose generation_prompt"
        )
    if algorithm.imitation_coef:
        yield (
            f"algorithm.imitation_coef ({algorithm.imitation_coef:g}) weighs successes from purified prompts, "
            "lens.enabled=false has none; set it to 0"
        )
    if algorithm.loss_weights == "crpo" and algorithm.weights_scope == "purified_only":
        yield (
            "algorithm.weights_scope=purified_only weighs groups with a second wave, lens.enabled=false has none; "
            "choose all, or algorithm.weights=none"
        )
