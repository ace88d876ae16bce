r"""Checks whether a machine is ready for a run: `python -m lens_megatron.doctor FILE [FILE ...] [a.b=value ...]`.

It checks versions, devices, links, shared memory, disk, model, tokenizer, template, and grading of real rows, each with
a remedy. `--checkpoint PATH` (a run folder or one iter_* folder) reads every file of its checkpoints instead, without
FILE. It changes nothing. Exit status: 0 ready (perhaps with warnings), 1 a check failed, 2 FILE or PATH cannot be used.
"""

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lens_megatron import command_line
from lens_megatron import config as configuration
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.config import Config, ConfigError
from lens_megatron.data.model_files import ModelError
from lens_megatron.data.model_hub import with_local_models
from lens_megatron.errors import UserError
from lens_megatron.tools.diagnosis import checkpoints, machine, project
from lens_megatron.tools.diagnosis.check import Check, CheckStatus
from lens_megatron.tools.planning.hardware import cluster_of
from lens_megatron.tools.planning.layout import LayerSpec
from lens_megatron.tools.planning.model_shape import read_shape
from lens_megatron.tools.planning.plan import LayoutError, make_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line per check as it is done, then how many failed; returns the exit status."""
    parser = ArgumentParser(prog="python -m lens_megatron.doctor", description=__doc__.splitlines()[0])
    what = "YAML files, see configs/, then section.option=value ..."
    parser.add_argument("words", nargs="*", metavar="FILE", help=what)
    parser.add_argument("--checkpoint", metavar="PATH", help="a run folder or one checkpoint: is all of it whole?")
    parsed = parser.parse_intermixed_args(arguments)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    command = command_line.split(parsed.words)
    if bool(parsed.words) == (parsed.checkpoint is not None) or (parsed.words and not command.files):
        parser.error("give either a configuration or --checkpoint PATH")
    try:
        if parsed.checkpoint is not None:
            found = checkpoints.examine(Path(parsed.checkpoint))
        else:
            config = configuration.load(command.files, command.overrides)
            load_methods(config)
            found = examine(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report(found)


def report(found: Iterable[Check]) -> int:
    """Prints each check as it is done; returns the exit status."""
    checks = []
    for check in found:
        print(line(check), flush=True)
        checks.append(check)
    failed, warned = (sum(c.status is status for c in checks) for status in (CheckStatus.FAIL, CheckStatus.WARN))
    print(f"{len(checks)} checks: {failed} failed, {warned} with a warning")
    return 1 if failed else 0


def line(check: Check) -> str:
    text = f"{check.status:<12}{check.name:<20}{check.found}"
    return f"{text}\n{'':<32}-> {check.remedy}" if check.remedy else text


def examine(config: Config) -> Iterator[Check]:
    """Makes all checks, the quick ones first. What a failed one makes pointless is left out."""
    cluster, gpus = cluster_of(config.cluster), machine.gpu_totals()
    yield from machine.versions(config, len(gpus))
    yield machine.devices(cluster, gpus)
    yield machine.link_bandwidth(cluster, len(gpus))
    yield machine.shared_memory(len(gpus))
    with suppress(ModelError):  # a model of the hub that training would download; what is not here yet fails below
        config = with_local_models(config, download=False)
    try:
        shape = read_shape(config.model.path)
    except ConfigError as error:
        yield Check("model", CheckStatus.FAIL, str(error), "download the model there, or set model.path")
        return
    try:
        plan = make_plan(config, LayerSpec.TRANSFORMER_ENGINE)
        yield project.layout(plan)
        yield machine.disk(config, plan)
    except LayoutError as error:
        yield Check("layout", CheckStatus.FAIL, str(error), "see python -m lens_megatron.plan")
    yield project.model(config, shape)
    check, tokenizer = project.tokenizer(config, shape.vocab_size)
    yield check
    if tokenizer is None:
        return
    checks, training = project.data(config, tokenizer)
    yield from checks
    if training is not None:
        yield project.template(config, tokenizer, training.prompts)
        yield project.grading(config, training.prompts)


if __name__ == "__main__":
    sys.exit(main())
