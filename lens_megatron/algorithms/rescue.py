"""Decides which prompts need a second wave, and puts its successes in the place of first-wave failures.

This is LENS, Algorithm 1, lines 9 and 13-18, as pure functions.
"""

import random

from lens_megatron.config import LensConfig
from lens_megatron.seeds import derive
from lens_megatron.types import Group, TrainingGroup


def is_hard(success_rate: float, lens: LensConfig) -> bool:
    """Returns whether the first wave's success rate is strictly below tau (LENS, Algorithm 1, line 9)."""
    return lens.enabled and success_rate < lens.tau


def merge(group: Group, lens: LensConfig, *, run_seed: int, step: int) -> TrainingGroup:
    """Returns the group as `step` trains on it: `replace_failures` with the seed of the group's place."""
    return replace_failures(group, lens, seed=derive(run_seed, "merge", step, group.place))


def replace_failures(group: Group, lens: LensConfig, *, seed: int) -> TrainingGroup:
    """Replaces random failures of the first wave by the successes of the second, if the gate opens (eq. 2, 3).

    The gate opens when the second wave has a higher success rate than the first, or with `lens.gate=always` when it has
    a success. With P the second wave's successes and F the first wave's failures, min(|F|, |P|) failures leave, and all
    of P comes in (with `lens.cap_rescued` only as many as failures leave). Failures of the second wave are never used.
    First-wave rollouts come first, in order. `seed` decides which failures leave.
    """
    native = group.native
    successes = tuple(r for r in group.rescue if r.correct)
    rescue_rate = len(successes) / len(group.rescue) if group.rescue else 0.0
    opens = bool(successes) and (lens.gate == "always" or rescue_rate > group.success_rate)
    if not opens:
        return TrainingGroup(group, native, gate=False)
    failures = [i for i, r in enumerate(native) if not r.correct]
    leaving = min(len(failures) - min(len(failures), lens.min_keep_failures), len(successes))
    removed = set(random.Random(seed).sample(failures, leaving))
    added = successes[:leaving] if lens.cap_rescued else successes
    return TrainingGroup(group, tuple(r for i, r in enumerate(native) if i not in removed) + added, gate=True)
