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

from lens_megatron import build, evaluate, train, update_batch
from lens_megatron.clock import Clock
from lens_megatron.policy import update
from lens_megatron.rollout.local import LocalEngine

HOOKS = {
    "start": (build, "build_policy"),
    "gen": (LocalEngine, "step"),
    "old_log_prob": (update_batch, "response_log_probs"),
    "ref": (update_batch, "response_log_probs"),
    "update_actor": (update, "model_output"),
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
        moment = clocks[-1].moment if clocks else None
        here = moment is None or (moment.step, moment.phase) == (step, phase)
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
