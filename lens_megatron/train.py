"""Runs the loop around `step`: checks everything, builds the run, resumes, steps, logs, evaluates, saves, stops."""

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lens_megatron import command_line
from lens_megatron import config as configuration
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.build import build_run, collective_patience
from lens_megatron.command_line import CommandLine
from lens_megatron.config import Config
from lens_megatron.errors import ExitCode, UserError
from lens_megatron.output import console, metrics, report, rollout_files, run_folder, second_wave_metrics
from lens_megatron.output.rollout_files import RolloutFiles
from lens_megatron.output.trackers import opening
from lens_megatron.phases.evaluate import Accuracy, evaluate
from lens_megatron.policy import checkpoint, checkpoint_files, platform, selection_state
from lens_megatron.policy.checkpoint import CheckpointWriter
from lens_megatron.policy.last_step import PolicyLastStep, is_exported
from lens_megatron.policy.parallel import shut_down
from lens_megatron.results import StepResult
from lens_megatron.rollout import replay
from lens_megatron.run import Run
from lens_megatron.step import run_step
from lens_megatron.supervision import non_finite
from lens_megatron.supervision.agreement import told_by_main
from lens_megatron.supervision.parent import end_with_launcher
from lens_megatron.supervision.stop import Stop
from lens_megatron.supervision.watchdog import watch

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as `arguments` say, by default those of the process; returns the exit status as an `ExitCode`."""
    return run(command_line.parse(arguments))


def run(command: CommandLine) -> int:
    """Trains and prints messages on the console. Returns an `ExitCode`; raises any error that is not a UserError."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with console.messages_on_console():
        try:
            config = configuration.load(command.files, command.overrides)
            console.set_level(config.run.log_level)
            train(config)
        except UserError as error:
            console.report_error(str(error))
            return error.exit_code
        finally:
            shut_down()
            console.leave_console()
    return ExitCode.DONE


def train(config: Config) -> None:
    """Trains as configured. Raises a UserError, where possible before anything is written."""
    with Stop() as stop:
        end_with_launcher()
        _train(config, stop)


def _train(config: Config, stop: Stop) -> None:
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    configuration.check_world(config, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    load_methods(config)  # what a user has misspelt is said before any device is taken
    opening.check_installed(config.run.trackers)
    device = platform.install()
    platform.init_process_group(device, collective_patience(config))
    stop.meet()
    if done := _what_is_done(config, device):
        if rank == 0:
            logger.info(
                f"{config.run.directory} has done its {done}\n"
                "to go on, or set run.if_exists=restart to move that run aside and start over."
            )
            logger.info(report.write(Path(config.run.directory)))
        return
    run, resuming = build_run(config, device)
    try:
        directory, deadline = Path(config.run.directory), config.run.phase_timeout_minutes
        with watch(run.clock, run.control, directory, deadline), _saver(run) as saver:
            _loop(run, _resume(run) if resuming else 0, stop, saver)
    finally:
        run.close()
    if run.is_main:
        logger.info(report.write(Path(config.run.directory)))


def _what_is_done(config: Config, device: torch.device) -> str:
    """Returns what the run in the folder has done and what would make it go on; nothing if it is not complete.

    Rank 0 looks and tells the others. A collective.
    """
    options = config.train

    def look() -> str:
        resuming = run_folder.check(config)
        folder = run_folder.checkpoints(config)
        saved = checkpoint_files.newest_state(folder) if resuming else None
        if saved is None or not options.ends(saved.step, saved.epoch or 0.0) or not is_exported(folder, saved.step):
            return ""
        if saved.step >= options.steps:
            return f"{options.steps} steps already; raise train.steps"
        return f"{options.epochs:g} epochs already, in {saved.step} steps; raise train.epochs"

    return told_by_main(look, device)


def _resume(run: Run) -> int:
    """Loads the newest checkpoint that every rank can read; returns the number of steps done."""
    folder = run_folder.checkpoints(run.config)
    with run.clock("load_checkpoint"):
        restore = partial(
            selection_state.restore, run.selection, run.methods.selection, run.config.rollout.prompts_per_step
        )
        state = checkpoint.resume(run.policy, folder, restore)
    if state is None:
        return 0
    logger.info(f"resumed from {folder}/iter_{state.step:07d}: {state.step} steps done")
    if moved := checkpoint.layout_change(state):
        logger.info(f"its layout was another ({moved}): equal up to rounding, not to the bit")
    return state.step


def _loop(run: Run, done: int, stop: Stop, saver: CheckpointWriter) -> None:
    config, skipped = run.config, 0
    readable, replayable = _rollout_files(run)
    writer = None
    if run.is_main:
        writer = metrics.MetricsWriter(
            Path(config.run.directory), first_step=done + 1, trackers=opening.open_trackers(config, done + 1)
        )
    last_step = PolicyLastStep(run.policy, run.trainer_memory, saver, run.abandon)
    saver.saved_step = done
    last_step.finish(done)
    stop.attach(last_step)
    _catch_up(run, done, writer, saver)
    step = done
    while not run.is_over(step):
        step += 1
        run.clock.step = step
        with run.clock("step"):
            result = run_step(run, step)
        if run.lease:
            run.lease.check()
        with run.clock("write_rollouts"):
            if readable:
                readable.write(step, rollout_files.rollout_lines(result, run.tokenizer, step))
            if replayable:
                replayable.write(step, [replay.to_json(graded.group) for graded in result.groups])
            run.unfinished.remove(step)
        logged = _step_metrics(run, result)
        if writer:
            writer.write(step, logged)  # before any save: a checkpoint whose row is missing would leave a permanent gap
        last_step.finish(step)
        evaluated = _evaluate(run) if _evaluation_is_due(run, step) else {}
        score = metrics.best_model_metric(evaluated, config.train.metric_for_best_model)
        if evaluated:
            evaluated |= metrics.with_more_seconds(logged, run.clock.take())
            if writer:
                writer.add(step, evaluated)
            last_step.finish(step, score)
        if writer:
            _log_step(config, step, logged)
        stopping, last = stop.agreed(run.mesh.device), run.is_over(step)
        if stopping or last:
            stop.claim()
        with run.clock("save_checkpoint"):
            saver.poll()
            if stopping or last or step % config.train.save_interval == 0:
                saver.save(step, score)
        skipped = non_finite.in_a_row(skipped, result.updates)
        non_finite.check(skipped, config.train.max_skipped_updates, step, Path(config.run.directory) / "non_finite")
        if stopping and not last:
            logger.info(f"stopped as asked after step {step}; the same command goes on from here")
            break
    with run.clock("save_checkpoint"):
        saver.poll(wait=True)
    if writer:
        writer.close()


def _evaluation_is_due(run: Run, step: int) -> bool:
    interval = run.config.train.eval_interval
    return step == 0 or run.is_over(step) or bool(interval and step % interval == 0)


def _catch_up(run: Run, done: int, writer: metrics.MetricsWriter | None, saver: CheckpointWriter) -> None:
    """Makes the evaluation and the export that the run was stopped before, after `done` steps. A collective."""
    config = run.config

    def look() -> str:
        rows = [row for row in metrics.read_metrics(Path(config.run.directory)) if row["step"] == done]
        return json.dumps({name: value for row in rows for name, value in row.items() if name.startswith("val-")})

    evaluated = json.loads(told_by_main(look, run.mesh.device))
    if _evaluation_is_due(run, done) and not evaluated:
        evaluated = _evaluate(run)
        if writer:
            writer.add(done, evaluated)
    if run.is_over(done) and not is_exported(run_folder.checkpoints(config), done):
        with run.clock("save_checkpoint"):
            saver.save(done, metrics.best_model_metric(evaluated, config.train.metric_for_best_model))


def _log_step(config: Config, step: int, logged: metrics.Metrics) -> None:
    logger.info(metrics.console_line(step, config.train.steps, logged))
    if warning := metrics.mismatch_warning(logged, config.algorithm.correction):
        logger.warning(warning)


def _saver(run: Run) -> CheckpointWriter:
    options = run.config.train
    return CheckpointWriter(
        run.policy,
        run_folder.checkpoints(run.config),
        model_path=run.config.model.path,
        keep_last=options.save_total_limit,
        keep_best=options.save_best_limit,
        background=options.async_save,
        before_publishing=run.lease.check if run.lease else None,
        selection=run.selection,
    )


def _evaluate(run: Run) -> metrics.Metrics:
    if not run.eval_plan.tasks:
        return {}
    if run.background:
        with run.clock("gen"):
            run.background.settle()
    with run.clock("testing"):
        evaluation = evaluate(run)
    found = metrics.sync_metrics(evaluation.sync)
    for result in evaluation.accuracies:
        found |= _accuracy_metrics(result)
        logger.info(
            f" {result.source}: accuracy {100 * result.correct.mean:.1f} % +- "
            f"{100 * result.correct.standard_error:.1f} over {result.prompts} problems"
        )
    return found


def _accuracy_metrics(result: Accuracy) -> metrics.Metrics:
    aux = f"val-aux/{result.source}"
    found = {
        metrics.accuracy_name(result.source, result.samples): result.correct.mean,
        f"{aux}/acc/standard_error": result.correct.standard_error,
        f"{aux}/truncated": result.truncated,
        f"{aux}/unparsed": result.unparsed,
        f"{aux}/grading_failed": result.grading_failed,
    }
    if result.samples > 1:
        found[f"{aux}/acc/pass@{result.samples}"] = result.pass_at
    if result.majority is not None:
        found[f"{aux}/acc/maj@{result.samples}"] = result.majority
    return found


def _step_metrics(run: Run, result: StepResult) -> metrics.Metrics:
    found = metrics.tally_step(result).reduce(run.mesh.dp_group, run.mesh.device)
    found |= metrics.update_metrics(result.updates, run.config.algorithm.kl_coef)
    found |= metrics.mismatch_metrics(result.updates, run.config.algorithm.correction)
    found |= metrics.sampling_metrics(result.sampling, run.mesh.device, run.engine_group.size)
    found |= metrics.selection_metrics(result.outcomes, found["lens/discarded_tokens"])
    found |= metrics.time_metrics(run.clock.take(), found, run.mesh.world_size)
    found |= second_wave_metrics.extra_cost(found, purifies=run.methods.purifier is not None)
    found |= metrics.sync_metrics(result.sync)
    return found | {
        "training/global_step": result.step,
        "training/epoch": run.selection.epoch(),
        "training/weight_version": run.policy.version,
    }


def _rollout_files(run: Run) -> tuple[RolloutFiles | None, RolloutFiles | None]:
    """Returns the files for people, in the run's folder, and those of debug.save_rollouts; None for unwanted ones."""
    own, asked = Path(run.config.run.directory) / "rollouts", run.config.debug.save_rollouts
    wanted = run.config.run.save_rollout_files
    return (
        RolloutFiles(own, "rollouts", run.mesh, required=False) if wanted else None,
        RolloutFiles(Path(asked), "debug.save_rollouts", run.mesh, required=True) if asked else None,
    )
