"""Computes the gradient of every method on the same batch, at the weights of a checkpoint, and takes no step.

    torchrun --nproc-per-node 1 -m lens_megatron.tools.compare.gradients SETTINGS.json

`lens-compare --gradients` writes the settings and starts it. The batch is sampled once, as LENS with tau = 1 samples
it, so that every prompt with a failure has both waves; it is kept in the folder, and read again when more methods are
asked for. Each method then sees what it would have seen: rewards by its own rules, second waves only where its own tau
calls a prompt hard, the groups that its own selection keeps.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lens_megatron import config as configuration
from lens_megatron.algorithms import rescue, samples
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.algorithms.policy_objective import policy_objective
from lens_megatron.batch.redistribute import redistribute
from lens_megatron.build import build_run, collective_patience
from lens_megatron.config import Config
from lens_megatron.errors import ExitCode, UserError
from lens_megatron.files import write_atomically
from lens_megatron.output import console, run_folder
from lens_megatron.phases import batch_numbers, collect, update
from lens_megatron.policy import checkpoint, platform, selection_state
from lens_megatron.policy.model import Policy, named_parameters
from lens_megatron.policy.optimizer_step import compute_gradients
from lens_megatron.policy.parallel import shut_down
from lens_megatron.reward.types import Grade, GradeStatus
from lens_megatron.rollout import replay
from lens_megatron.rollout.engine import Completion
from lens_megatron.rollout.rewarding import Rewarding
from lens_megatron.run import Run
from lens_megatron.tools.compare.gradient_report import GradientReport, MethodGradient, class_numbers, products
from lens_megatron.tools.compare.request import CompareError, GradientSettings
from lens_megatron.types import Group, Rollout, Sample, StepPrompt, TrainingGroup

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes the gradients that the settings ask for; returns an `ExitCode`."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with console.messages_on_console():
        try:
            settings = TypeAdapter(GradientSettings).validate_json(Path(path).read_bytes())
            report = measure(settings)
            write_atomically(Path(settings.out), json.dumps(asdict(report), indent=1) + "\n")
        except (UserError, ValidationError) as error:
            console.report_error(str(error))
            return error.exit_code if isinstance(error, UserError) else ExitCode.MISTAKE
        finally:
            shut_down()
    return ExitCode.DONE


def measure(settings: GradientSettings) -> GradientReport:
    """Samples or reads the batch and computes each method's gradient on it. Needs a world of one process.

    All gradients are in host memory together, 4 bytes for each parameter and method. Raises a UserError.
    """
    config = configuration.load(settings.sampling)
    if int(os.environ.get("WORLD_SIZE", 1)) != 1:
        raise CompareError(f"gradients are compared in one process, not in {os.environ['WORLD_SIZE']}; start one")
    device = platform.install()
    platform.init_process_group(device, collective_patience(config))
    run, _ = build_run(config, device)
    try:
        restore = partial(
            selection_state.restore, run.selection, run.methods.selection, config.rollout.prompts_per_step
        )
        if checkpoint.resume(run.policy, run_folder.checkpoints(config), restore) is None:
            raise CompareError(f"{config.run.directory} holds no checkpoint; delete that folder and start again")
        groups = _batch(run, settings)
        found = [_of_method(run, configuration.load(path), groups, settings.step) for _, path in settings.methods]
    finally:
        run.close()
    dots = products([gradient for gradient, *_ in found])
    return GradientReport(
        fork=settings.fork,
        prompts=len(groups),
        second_waves=sum(bool(group.rescue) for group in groups),
        layer_groups=dots.names,
        methods=tuple(
            MethodGradient(name, kept, dots.norm(place), dots.norms(place), class_numbers(own))
            for place, ((name, _), (_, kept, own)) in enumerate(zip(settings.methods, found, strict=True))
        ),
        whole=dots.whole(),
        by_group=dots.cosines(),
    )


def _batch(run: Run, settings: GradientSettings) -> list[Group]:
    """Returns the groups of the batch, by place; samples and keeps them if there are none yet."""
    path, count = replay.replay_path(settings.batch, settings.step), run.config.rollout.prompts_per_step
    if not path.exists():
        groups = collect.take_groups(run, settings.step).groups
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(replay.to_json(group) + "\n" for group in groups))
        run.unfinished.remove(settings.step)
    return replay.read_groups(settings.batch, settings.step, count=count, vocab_size=run.policy.vocab_size)


def _of_method(
    run: Run, config: Config, groups: Sequence[Group], step: int
) -> tuple[dict[str, Tensor], int, list[Sample]]:
    """Returns the method's gradient by parameter, how many groups it keeps, and their samples."""
    own = replace(run, config=config, methods=load_methods(config))
    seen = [as_sampled_by(own, group, step) for group in groups]
    merged = [rescue.merge(group, config.lens, run_seed=config.run.seed, step=step) for group in seen]
    kept = _kept(own, merged)
    weighted = samples.to_samples(kept, batch_numbers.gather(own, kept), own.methods.advantage, config.algorithm)
    trained = [sample for sample in weighted if sample.keep]
    by_prompt, hidden_size = own.policy.shares_prompts, own.policy.bridge.config.hidden_size
    # In the order of an update, so that micro-batches and their rounding are the same.
    share = redistribute(trained, own.mesh.dp_group, hidden_size, by_prompt=by_prompt)
    rows = update.training_rows(own, share.samples)
    if rows:
        objective = policy_objective(config.algorithm, own.methods.objective)
        batches = update.pack_update(own, rows).batches
        compute_gradients(own.policy, batches, objective, config.algorithm, config.rollout.temperature)
        return read_gradients(own.policy), len(kept), weighted
    nothing = {name: torch.zeros_like(tensor) for name, tensor in read_gradients(own.policy).items()}
    return nothing, len(kept), weighted


def read_gradients(policy: Policy) -> dict[str, Tensor]:
    """Returns a float32 copy in host memory of what `compute_gradients` left, by the names of the parameters."""
    return {
        name: parameter.main_grad.detach().float().to("cpu", copy=True)  # type: ignore[attr-defined]  # Megatron's
        for name, parameter in named_parameters(policy.models())
    }


def as_sampled_by(run: Run, group: Group, step: int) -> Group:
    """Returns the group as the run's method would have had it: its reward rules, and a second wave only if hard."""
    rewarded = replace(
        group,
        native=tuple(_rewarded(run, group, rollout, i, step) for i, rollout in enumerate(group.native)),
        rescue=tuple(_rewarded(run, group, rollout, i, step) for i, rollout in enumerate(group.rescue)),
    )
    hard = rescue.is_hard(rewarded.success_rate, run.config.lens)
    return rewarded if hard else replace(rewarded, rescue=(), purified=None)


def _rewarded(run: Run, group: Group, rollout: Rollout, sample: int, step: int) -> Rollout:
    rules = run.methods.reward_rules
    if not rules:
        return rollout
    grade = Rewarding(rules, run.config.reward.success_threshold).final(
        Grade(rollout.status, rollout.reward, 0.0),
        StepPrompt(group.place, group.prompt, group.purified),
        rollout.origin,
        sample,
        Completion(0, rollout.token_ids, rollout.log_probs, rollout.finished, rollout.weight_version),
        run.tokenizer.decode(rollout.token_ids),
        step=step,
        run_seed=run.config.run.seed,
        max_response_length=run.config.rollout.max_response_length,
    )
    return replace(rollout, reward=grade.score, status=GradeStatus(grade.status))


def _kept(run: Run, merged: Sequence[TrainingGroup]) -> list[TrainingGroup]:
    chosen = run.methods.selection
    selection = chosen.call(run.prompts, run.config.run.seed, chosen.options)
    return [group for group in merged if selection.keep(group)]


if __name__ == "__main__":
    sys.exit(main())
