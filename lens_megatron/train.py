"""The loop around `step`: check everything, build the run, resume, step, log, evaluate, save, stop."""

import logging
import os
import signal
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from lens_megatron import config as configuration
from lens_megatron import exit_codes, metrics, report, run_folder
from lens_megatron.agreement import ToldError, told_by_main
from lens_megatron.build import build_run, collective_patience
from lens_megatron.config import Config, ConfigError
from lens_megatron.errors import say_error
from lens_megatron.evaluate import evaluate
from lens_megatron.policy import checkpoint, platform
from lens_megatron.policy.checkpoint import CheckpointError, CheckpointWriter
from lens_megatron.policy.hf_weights import ModelError
from lens_megatron.policy.parallel import shut_down
from lens_megatron.prompts import DataError
from lens_megatron.reward import GraderStartError
from lens_megatron.rollout import replay
from lens_megatron.rollout.engine import EnginesLostError
from lens_megatron.rollout.meter import SamplingProgress
from lens_megatron.rollout.replay import ReplayError
from lens_megatron.run import Run
from lens_megatron.run_folder import RunFolderError
from lens_megatron.run_lease import FolderInUseError
from lens_megatron.step import run_step
from lens_megatron.supervision import non_finite
from lens_megatron.supervision.non_finite import NonFiniteError
from lens_megatron.supervision.parent import end_with_launcher
from lens_megatron.supervision.watchdog import watch
from lens_megatron.tokenizer import TokenizerError
from lens_megatron.types import StepResult
from lens_megatron.weight_sync import WeightSyncError

USER_ERRORS = (
    ConfigError,
    DataError,
    ModelError,
    TokenizerError,
    RunFolderError,
    FolderInUseError,
    ToldError,
    CheckpointError,
    GraderStartError,
    ReplayError,
    WeightSyncError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns one of `exit_codes`."""
    parser = ArgumentParser(prog="pretrain_lens.py", description="Train a reasoning model with LENS or GRPO.")
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.option=value")
    parsed = parser.parse_args(arguments)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        train(configuration.load(parsed.config, parsed.overrides))
    except EnginesLostError as error:
        say_error(f"{error}\nwhat was graded is kept: the same command goes on from there")
        return exit_codes.ENGINES_LOST
    except (*USER_ERRORS, NonFiniteError) as error:
        say_error(str(error))
        return exit_codes.NON_FINITE if isinstance(error, NonFiniteError) else exit_codes.MISTAKE
    finally:
        shut_down()
    return exit_codes.DONE


def train(config: Config) -> None:
    """Trains as configured. Raises one of USER_ERRORS, before anything is written, when it cannot; NonFiniteError."""
    stop = StopRequest()
    end_with_launcher()
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    config.check_world(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    device = platform.install()
    platform.init_process_group(device, collective_patience(config))
    if _is_done(config, device):
        if rank == 0:
            metrics.say(f"{config.run.directory} has done its {config.train.steps} steps already; raise train.steps")
            metrics.say("to go on, or set run.if_exists=restart to move that run aside and start over.")
            metrics.say(report.write(Path(config.run.directory)))
        return
    run, resuming = build_run(config, device)
    try:
        directory, deadline = Path(config.run.directory), config.run.phase_timeout_minutes
        with watch(run.clock, run.control, directory, deadline), _saver(run) as saver:
            _loop(run, _resume(run) if resuming else 0, stop, saver)
    finally:
        run.close()
    if run.is_main:
        metrics.say(report.write(Path(config.run.directory)))


def _is_done(config: Config, device: torch.device) -> bool:
    """Whether the folder holds a run with nothing left to do. Rank 0 looks and tells the others. A collective."""

    def look() -> str:
        resuming = run_folder.check(config)
        saved = checkpoint.steps_saved(run_folder.checkpoints(config)) if resuming else -1
        return "done" if saved >= config.train.steps else "not done"

    return told_by_main(look, device) == "done"


class StopRequest:
    """SIGINT or SIGTERM asks for an orderly stop; another one, seconds later, interrupts at once.

    Not at once: Ctrl-C reaches a process from the terminal, and again from torchrun.
    """

    SECONDS = 5.0

    def __init__(self):
        self.asked, self.since = False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            if time.monotonic() - self.since > self.SECONDS:
                raise KeyboardInterrupt
            return
        self.asked, self.since = True, time.monotonic()
        metrics.say(f"{signal.Signals(number).name}: finishing this step, then saving and stopping")

    def agreed(self, device: torch.device) -> bool:
        """True on every rank when any rank was asked. A collective."""
        asked = torch.tensor([self.asked], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())


def _resume(run: Run) -> int:
    """Loads the newest checkpoint that every rank can read; returns the number of steps done."""
    folder = run_folder.checkpoints(run.config)
    with run.clock("load_checkpoint"):
        state = checkpoint.resume(run.policy, folder)
    if state is None:
        return 0
    if run.is_main:
        metrics.say(f"resumed from {folder}/iter_{state.step:07d}: {state.step} steps done")
        moved = checkpoint.layout_change(state)
        if moved:
            metrics.say(f"its layout was another ({moved}): equal up to rounding, not to the bit")
    return state.step


def _loop(run: Run, done: int, stop: StopRequest, saver: CheckpointWriter) -> None:
    config, skipped = run.config, 0
    writer = None
    if run.is_main:
        writer = metrics.MetricsWriter(
            Path(config.run.directory), first_step=done + 1, tensorboard=config.run.tensorboard
        )
    if done == 0:
        first = _evaluate(run)
        if writer:
            writer.write(0, first)
    for step in range(done + 1, config.train.steps + 1):
        run.clock.step = step
        run.sampler.on_progress = bar = _progress_bar(run, step)
        with run.clock("step"):
            result = run_step(run, step)
        bar.close()
        if run.lease:
            run.lease.check()
        with run.clock("write_rollouts"):
            _write_rollouts(run, result)
            run.sampler.store.remove(step)
        stopping = stop.agreed(run.mesh.device)
        last = step == config.train.steps
        interval = config.train.eval_interval
        evaluated = _evaluate(run) if last or (interval and step % interval == 0) else {}
        logged = _step_metrics(run, result) | evaluated
        if writer:
            writer.write(step, logged)  # before the save: a checkpoint whose row is missing would leave a gap for good
            metrics.say(metrics.console_line(step, config.train.steps, logged))
            if warning := metrics.mismatch_warning(logged, config.algorithm.correction):
                metrics.say(warning)
        with run.clock("save_checkpoint"):
            saver.poll()
            if stopping or last or step % config.train.save_interval == 0:
                saver.save(step, metrics.best_model_metric(evaluated, config.train.metric_for_best_model))
        skipped = non_finite.in_a_row(skipped, result.updates)
        non_finite.check(skipped, config.train.max_skipped_updates, step, Path(config.run.directory) / "non_finite")
        if stopping and not last:
            if run.is_main:
                metrics.say(f"stopped as asked after step {step}; the same command goes on from here")
            break
    with run.clock("save_checkpoint"):
        saver.poll(wait=True)
    if writer:
        writer.close()


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
    )


def _evaluate(run: Run) -> metrics.Metrics:
    if not run.eval_prompts:
        return {}
    if run.ahead:
        with run.clock("gen"):
            run.ahead.settle()
    with run.clock("testing"):
        results = evaluate(run)
    samples = run.config.train.eval_samples
    found = {}
    for result in results:
        found[metrics.accuracy_name(result.source, samples)] = result.mean
        found[f"val-aux/{result.source}/acc/standard_error"] = result.standard_error
        if run.is_main:
            metrics.say(
                f" {result.source}: accuracy {100 * result.mean:.1f} % +- {100 * result.standard_error:.1f} "
                f"over {result.prompts} problems"
            )
    return found


def _step_metrics(run: Run, result: StepResult) -> metrics.Metrics:
    found = metrics.tally_step(result).reduce(run.mesh.dp_group, run.mesh.device)
    found |= metrics.update_metrics(result.updates, run.config.algorithm.kl_coef)
    found |= metrics.mismatch_metrics(result.updates, run.config.algorithm.correction)
    found |= metrics.sampling_metrics(result.sampling, run.mesh.device, run.team.size)
    found |= metrics.time_metrics(run.clock.take(), found, run.mesh.world_size)
    return found | {
        "training/global_step": result.step,
        "training/epoch": run.prompts.epoch(result.step - 1),
        "training/weight_version": run.policy.version,
        "perf/weight_sync_bytes": result.sync.bytes,
        "perf/weight_sync_received_bytes": result.sync.received_bytes,
        "perf/weight_sync_gb_per_s": result.sync.gb_per_s,
        "training/canary_log_prob_diff": result.sync.canary_difference,
    }


def _write_rollouts(run: Run, result: StepResult) -> None:
    """Every data-parallel rank writes its part; rank 0 joins them."""
    config, folders = run.config, []
    if config.run.save_rollout_files:
        lines = run_folder.rollout_lines(result, run.tokenizer, result.step)
        folders.append((Path(config.run.directory) / "rollouts", lines))
    if config.debug.save_rollouts:
        folders.append((Path(config.debug.save_rollouts), [replay.to_json(g.group) for g in result.groups]))
    for folder, lines in folders:
        if run.mesh.model_rank == 0:
            run_folder.write_part(folder, result.step, run.mesh.dp_rank, lines)
        torch.distributed.barrier()
        if run.is_main:
            run_folder.join_parts(folder, result.step)


class _Bar:
    """A live bar of finished rollouts on the main rank's terminal."""

    def __init__(self, step: int, total: int, shown: bool):
        self.bar = tqdm(total=total, desc=f"step {step} sampling", unit="rollout", leave=False, disable=not shown)

    def __call__(self, progress: SamplingProgress) -> None:
        if self.bar.disable:
            return
        self.bar.total = max(self.bar.total, progress.total)
        self.bar.set_postfix_str(
            f"{progress.running} running, {progress.waiting} waiting, {progress.second_wave} second wave, "
            f"{progress.tokens_per_second:.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(progress.finished - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def _progress_bar(run: Run, step: int) -> Callable[[SamplingProgress], None]:
    share = len(range(run.team.number, run.config.rollout.prompts_per_step, run.team.engines))
    shown = run.is_main and os.isatty(2)
    return _Bar(step, share * run.config.rollout.rollouts_per_prompt, shown)
