"""Says what a run will take, before it takes any GPU: `python -m lens_megatron.plan FILE [FILE ...] [a.b=value ...]`.

It prints memory per GPU by phase and component, seconds per phase, and bytes of weight sync, on the configuration's
`cluster`. Exit status: 0 it fits, 2 it cannot run as it stands, with the reasons.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace

from lens_megatron import command_line
from lens_megatron import config as configuration
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.errors import UserError
from lens_megatron.tools.planning.layout import LayerSpec
from lens_megatron.tools.planning.plan import make_plan
from lens_megatron.tools.planning.step_time import Assumptions
from lens_megatron.tools.planning.table import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan; returns the exit status."""
    parser = ArgumentParser(prog="python -m lens_megatron.plan", description=__doc__.splitlines()[0])
    what = "YAML files, see configs/, then section.option=value ..."
    parser.add_argument("words", nargs="+", metavar="FILE", help=what)
    specs = [spec.value for spec in LayerSpec]
    parser.add_argument("--layer-spec", choices=specs, default=specs[0], help="layers to reckon with")
    parser.add_argument("--mean-length", type=float, default=0.5, help="mean length / limit, of prompts and responses")
    parser.add_argument("--hard-share", type=float, default=0.5, help="LENS: share of prompts sampled a second time")
    parsed = parser.parse_intermixed_args(arguments)
    for name in ("mean_length", "hard_share"):
        if not 0 <= getattr(parsed, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(parsed, name)}: expected a share between 0 and 1")
    command = command_line.split(parsed.words)
    if not command.files:
        parser.error("give a configuration first: a YAML file, see configs/")
    assumed = replace(Assumptions(), mean_length_share=parsed.mean_length, hard_share=parsed.hard_share)
    try:
        config = configuration.load(command.files, command.overrides)
        load_methods(config)
        plan = make_plan(config, LayerSpec(parsed.layer_spec), assumed)
    except UserError as error:
        return _refuse(str(error).splitlines())
    print(render(plan))
    return _refuse(plan.mistakes) if plan.mistakes else 0


def _refuse(mistakes: Sequence[str]) -> int:
    sys.stdout.flush()
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
