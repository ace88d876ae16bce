"""The real program with one phase that takes an hour on the last rank: `slow_run.py --config ...`.

SLOW_PHASE   which one, see HOOKS
SLOW_STEP    in which step
SLOW_REACHED a file that is made when the phase has begun
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lens_megatron import build, train
from lens_megatron.phases import evaluate, update
from lens_megatron.policy import optimizer_step
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.supervision.clock import Clock

HOOKS = {
    "start": (build, "build_policy"),
    "gen": (LocalEngine, "step"),
    "old_log_prob": (update, "response_log_probs"),
    "ref": (update, "response_log_probs"),
    "update_actor": (optimizer_step, "model_output"),
    "testing": (evaluate, "open_queue"),
}
"""Where each phase spends its time. `ref` is entered with the reference policy's weights in place."""

clocks: list[Clock] = []


def remember(made: Callable[[], Clock]) -> Callable[[], Clock]:
    def make() -> Clock:
        clocks.append(made())
        return clocks[-1]

    return make


def slowed(function: Callable, phase: str, step: int, reached: Path) -> Callable:
    def replacement(*arguments, **options):
        position = clocks[-1].position if clocks else None
        here = position is None or (position.step, position.phase) == (step, phase)
        if here and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            reached.touch()
            time.sleep(3600)
        return function(*arguments, **options)

    return replacement


if __name__ == "__main__":
    phase, step, reached = os.environ["SLOW_PHASE"], int(os.environ["SLOW_STEP"]), Path(os.environ["SLOW_REACHED"])
    build.Clock = remember(Clock)
    if phase in HOOKS:
        owner, name = HOOKS[phase]
        setattr(owner, name, slowed(getattr(owner, name), phase, step, reached))
    sys.exit(train.main())
