"""Builds from a configuration everything that one rank of a run holds; makes the cheapest checks first."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lens_megatron.algorithms.entry import Evidence
from lens_megatron.algorithms.methods import Methods, load_methods
from lens_megatron.algorithms.reward_rules import try_rules
from lens_megatron.config import Config, ConfigError
from lens_megatron.config.rules import machine_mistakes
from lens_megatron.data.model_hub import with_local_models
from lens_megatron.data.prompts import DataError, PromptStream, load_prompts
from lens_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lens_megatron.evaluation.plan import EvalPlan, plan_as_in_training, plan_by_protocol, warn_of_overlap
from lens_megatron.files import why_no_folder
from lens_megatron.output import metrics, run_folder
from lens_megatron.output.progress_bar import ProgressBar
from lens_megatron.output.run_folder import RunFolderError
from lens_megatron.output.run_lease import RunLease
from lens_megatron.policy import platform
from lens_megatron.policy.model import DTYPES, build_policy, check_layout
from lens_megatron.policy.model_check import check_model
from lens_megatron.policy.offload import TrainerMemory, is_enabled
from lens_megatron.policy.parallel import Mesh, build_mesh
from lens_megatron.reward import GraderPool, GraderStartError
from lens_megatron.rollout import replay
from lens_megatron.rollout.background import BackgroundSampling
from lens_megatron.rollout.engine import RolloutEngine
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.progress import NoDisplay
from lens_megatron.rollout.request_store import RequestStore
from lens_megatron.rollout.rewarding import Rewarding
from lens_megatron.rollout.scheduler import RolloutScheduler
from lens_megatron.rollout.servers.engine import connect
from lens_megatron.rollout.servers.process import ServerProcess, start_servers, stop_all
from lens_megatron.rollout.unfinished import UnfinishedGroups
from lens_megatron.rollout.vllm import options as vllm_options
from lens_megatron.rollout.vllm.engine import VllmEngine
from lens_megatron.rollout.vllm.tensor_parallel import EngineGroup, TensorParallelEngine, build_engine_group
from lens_megatron.run import Run
from lens_megatron.supervision.agreement import together, told_by_main
from lens_megatron.supervision.clock import Clock
from lens_megatron.supervision.control_store import ControlStore
from lens_megatron.types import Prompt

logger = logging.getLogger(__name__)


def build_run(config: Config, device: torch.device) -> tuple[Run, bool]:
    """Returns the run, and whether it continues an earlier one. Needs torch.distributed.

    Checks model, tokenizer and data, then takes the device's memory, and only then creates the run folder.
    """
    asked, config = config, _for_this_machine(config)  # the run's folder keeps a hub's name, not where it lies here
    methods = load_methods(config)
    hf_config = check_model(config)
    check_layout(config, hf_config)
    if config.rollout.engine in ("vllm", "vllm_server"):
        vllm_options.check(config, hf_config)
    tokenizer = load_tokenizer(config.model.path, hf_config.vocab_size)
    _check_replay(config, hf_config.vocab_size)
    graders = _start_graders(config)
    prompts, eval_plan = _load_data(config, methods, tokenizer, hf_config)
    rewarding = _build_rewarding(config, methods, prompts)
    patience = collective_patience(config)
    control = platform.open_control_store(device)
    mesh = build_mesh(config.megatron, config.run.seed, device, patience)
    engine_group = build_engine_group(config.ranks_per_engine, patience)
    servers = start_servers(config, hf_config, mesh.rank, mesh.world_size)  # starting them takes longest
    with ExitStack() as on_failure:
        on_failure.callback(control.close)
        on_failure.callback(stop_all, servers)
        policy = build_policy(config, mesh)
        _await_graders(graders, device)
        resuming, lease = _take_folder(asked, mesh, on_failure)
        memory = TrainerMemory(policy, enabled=is_enabled(config, device))
        memory.to_host()  # vLLM measures the free memory before it takes its share
        engine = _build_engine(config, hf_config, device, engine_group, servers)
        memory.to_device()
        on_failure.pop_all()
    unfinished = _build_unfinished(config, mesh)
    display = ProgressBar() if mesh.rank == 0 and os.isatty(2) else NoDisplay()
    request_store = _build_request_store(config, engine_group, control)
    options = config.rollout, config.lens, config.run.seed, unfinished, request_store, display
    scheduler = RolloutScheduler(engine, graders, tokenizer.decode, *options, rewarding=rewarding)
    run = Run(
        config=config,
        methods=methods,
        mesh=mesh,
        control=control,
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        selection=methods.selection.call(prompts, config.run.seed, methods.selection.options),
        eval_plan=eval_plan,
        engine=engine,
        engine_group=engine_group,
        graders=graders,
        scheduler=scheduler,
        unfinished=unfinished,
        background=BackgroundSampling() if config.rollout.off_policy_steps else None,
        trainer_memory=memory,
        lease=lease,
        clock=Clock(),
    )
    _describe(run)
    return run, resuming


def _for_this_machine(config: Config) -> Config:
    """Returns `config` with this machine's folders in place of models that are named as on the hub.

    Raises ConfigError, RunFolderError or ModelError if this machine cannot run the configuration.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    for mistake in machine_mistakes(config, ranks_here, os.cpu_count() or 1):
        raise ConfigError(mistake)
    if why := why_no_folder(Path(config.run.directory)):
        raise RunFolderError(f"run.directory {config.run.directory}: {why}; choose another folder")
    return with_local_models(config)


def collective_patience(config: Config) -> float:
    """Returns the time limit of collectives in minutes: above the watchdog's, which reports more and so comes first."""
    return config.run.phase_timeout_minutes + 10 if config.run.phase_timeout_minutes else 30


def _build_engine(
    config: Config,
    hf_config: PretrainedConfig,
    device: torch.device,
    engine_group: EngineGroup,
    servers: Sequence[ServerProcess],
) -> RolloutEngine:
    """Builds this rank's engine. A collective where the engine is vLLM's."""
    if config.rollout.engine == "vllm":
        engine = VllmEngine(config, hf_config)
        if engine.bytes_while_asleep is not None:
            logger.info(f"vLLM asleep leaves {engine.bytes_while_asleep / 2**30:.2f} GiB of the GPU in use")
        return engine if engine_group.size == 1 else TensorParallelEngine(engine, engine_group)
    if config.rollout.engine == "vllm_server":
        return _connect(config, hf_config, device, servers)
    return LocalEngine(
        config.model.path,
        max_running_sequences=config.rollout.max_running_sequences,
        dtype=DTYPES[config.model.dtype],
        device=str(device),
    )


def _connect(
    config: Config, hf_config: PretrainedConfig, device: torch.device, servers: Sequence[ServerProcess]
) -> RolloutEngine:
    """Returns the engine over this rank's servers. A collective; raises ConfigError on all ranks if any has none."""
    elsewhere = ConfigError("the servers of another rank cannot be used")
    return together(lambda: connect(config, hf_config, servers), ConfigError, elsewhere, device)


def _build_unfinished(config: Config, mesh: Mesh) -> UnfinishedGroups:
    share = mesh.dp_rank + mesh.dp_size * mesh.model_rank  # as `phases.collect` distributes the prompts
    staleness = config.rollout.off_policy_steps * config.train.updates_per_batch
    return UnfinishedGroups(Path(config.run.directory) / "unfinished", share, mesh.world_size, staleness)


def _build_request_store(config: Config, engine_group: EngineGroup, store: ControlStore) -> RequestStore | None:
    """Builds the store through which engines share requests; an engine over several ranks has it on the first one."""
    return (
        RequestStore(store, engine_group.number, engine_group.engines)
        if config.rollout.shares_work and engine_group.leads and engine_group.engines > 1
        else None
    )


def _check_replay(config: Config, vocab_size: int) -> None:
    """Raises ReplayError where rollouts cannot be read or saved. Of later steps it checks only that files exist."""
    loaded = config.debug.load_rollouts
    replay.check_folders(loaded, config.debug.save_rollouts, config.train.steps)
    if loaded and config.train.steps:
        fewer = config.selection.method != "every_prompt"  # whether it rejects groups is known once there are prompts
        replay.read_groups(loaded, 1, count=config.rollout.prompts_per_step, vocab_size=vocab_size, fewer=fewer)


def _start_graders(config: Config) -> GraderPool:
    try:
        reward = config.reward
        return GraderPool(reward.workers_per_rank, reward.timeout_s, reward.grader, reward.weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _build_rewarding(config: Config, methods: Methods, prompts: PromptStream) -> Rewarding:
    """Raises RewardRuleError, or another UserError, where a reward rule cannot work in this run."""
    try_rules(methods.reward_rules, prompts.at(0), config.rollout.max_response_length)
    return Rewarding(methods.reward_rules, config.reward.success_threshold)


def _await_graders(graders: GraderPool, device: torch.device) -> None:
    """Waits until the graders of every rank have loaded, so that no rank takes the folder earlier. A collective.

    Raises GraderStartError where they cannot be loaded, ConfigError on other ranks.
    """
    elsewhere = ConfigError("the graders of another rank cannot be loaded, see its message")
    together(graders.wait_ready, GraderStartError, elsewhere, device)


def _load_data(
    config: Config, methods: Methods, tokenizer: Tokenizer, hf_config: PretrainedConfig
) -> tuple[PromptStream, EvalPlan]:
    load = partial(
        load_prompts, tokenizer=tokenizer.hf, data=config.data, lens=config.lens, whole_rows=config.reward.needs_rows
    )
    training = load(config.data.train)
    held_out = [] if config.train.eval_protocol else [load(source) for source in config.data.eval]
    for loaded in (training, *held_out):
        dropped = f", {loaded.dropped_too_long} longer than data.max_prompt_length dropped"
        logger.info(f"{loaded.source}: {len(loaded.prompts)} prompts" + dropped * bool(loaded.dropped_too_long))
    if len(training.prompts) < config.rollout.prompts_per_step:
        raise DataError(
            f"data.train has {len(training.prompts)} usable prompts, rollout.prompts_per_step asks for "
            f"{config.rollout.prompts_per_step}; lower it or give more data"
        )
    _check_noise_marks(config, methods, training.prompts)
    stream = PromptStream(training.prompts, config.run.seed, config.data.shuffle)
    if config.train.eval_protocol:
        plan = plan_by_protocol(config, tokenizer, _context(config, hf_config))
    else:
        plan = plan_as_in_training(config, [prompt for loaded in held_out for prompt in loaded.prompts])
    names = sorted({metrics.accuracy_name(task.prompt.source, task.samples) for task in plan.tasks})
    wanted = config.train.metric_for_best_model
    if wanted is not None and wanted not in names:
        raise ConfigError(f"train.metric_for_best_model: no metric {wanted!r}; data.eval gives {', '.join(names)}")
    if int(os.environ.get("RANK", 0)) == 0:
        warn_of_overlap(training.prompts, plan.tasks, config.data.train)
    return stream, plan


def _context(config: Config, hf_config: PretrainedConfig) -> int:
    """Returns the tokens of prompt and completion together that the engine takes."""
    limit = config.vllm.model_dump().get("max_model_len") if config.rollout.engine != "local" else None
    return min(limit or hf_config.max_position_embeddings, hf_config.max_position_embeddings)


def _check_noise_marks(config: Config, methods: Methods, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError where a method needs tokens that are marked as noise and may be deleted, but none is."""
    marked = any(any(noise and go for noise, go in zip(p.noise, p.eligible, strict=False)) for p in prompts)
    if methods.need(Evidence.NOISE_MARKS) and not marked:
        raise ConfigError(
            f"lens.purifier={config.lens.purifier} deletes what the data marks as noise, and data.noise_key="
            f"{config.data.noise_key} marks no token of data.train={config.data.train} that may be deleted; name a "
            "column of [start, end) characters of the problem in data.noise_key, or choose another purifier"
        )


def _take_folder(config: Config, mesh: Mesh, on_failure: ExitStack) -> tuple[bool, RunLease | None]:
    """Takes the folder on rank 0 and tells all ranks whether to resume; every rank checks that it has the same folder.

    Only rank 0 gets the lease. A collective. Raises RunFolderError, FolderInUseError; on other ranks ToldError.
    """
    layout, taken = config.megatron, []
    topology = {
        "world_size": mesh.world_size,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
    }

    def take() -> str:
        taken.append(run_folder.take(config, topology))
        on_failure.callback(taken[0].lease.release)
        if taken[0].moved:
            logger.info(f"the run that was in {taken[0].path} is now in {taken[0].moved}")
        return f"{taken[0].token} {'resume' if taken[0].resuming else 'begin'}"

    token, what = told_by_main(take, mesh.device).split()
    elsewhere = ConfigError("another rank has another run.directory, see its message")
    together(lambda: run_folder.check_shared(config, token), RunFolderError, elsewhere, mesh.device)
    return what == "resume", taken[0].lease if taken else None


def _describe(run: Run) -> None:
    mesh = run.mesh
    parameters = sum(p.numel() for chunk in run.policy.chunks for p in chunk.parameters())
    logger.info(
        f"purifier {run.methods.purifier.name if run.methods.purifier else 'none'}, "
        f"advantage {run.config.algorithm.advantage}; "
        f"{mesh.world_size} ranks on {mesh.device.type}: TP{mesh.tp_size} CP{mesh.cp_size} PP{mesh.pp_size} "
        f"DP{mesh.dp_size}; "
        f"{parameters:,} parameters on rank 0; {run.config.rollout.prompts_per_step} prompts x "
        f"{run.config.rollout.rollouts_per_prompt} rollouts per step; results in {run.config.run.directory}"
    )
