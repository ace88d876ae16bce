"""Reads the command line of a training run. Imports neither torch nor Megatron, so that `--help` is fast.

`--help WORD` imports torch where the word is about methods, which are described by their own files.
"""

import os
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lens_megatron
from lens_megatron.algorithms import listing
from lens_megatron.config import help as option_help

USAGE = """\
torchrun --nproc-per-node N pretrain_lens.py --config FILE [FILE ...] [section.option=value ...]
       pretrain_lens.py --help [WORD] | --version
"""
INTRODUCTION = """\
Trains a reasoning model by reinforcement learning, with LENS or another method. Every option below may stand in a YAML
file, as in configs/, and on the command line, which is stronger: lens.tau=0.4. A value there is YAML; an empty one
leaves an option empty. Of several files a later one is stronger: --config configs/demo.yaml configs/methods/dapo.yaml.
--help WORD shows the section WORD, or every option whose name or meaning contains it, and the methods of that name or
kind. python -m lens_megatron.algorithms lists all methods with the options of their own.
"""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The arguments of a training run.

    Example: CommandLine(("configs/demo.yaml", "configs/methods/dapo.yaml"), ("train.steps=100",)).
    """

    files: tuple[str, ...]
    overrides: tuple[str, ...]


def split(words: Sequence[str]) -> CommandLine:
    """Divides words into the files, which come first, and the overrides, which have an `=` in their first part.

    A file whose name is like an override is written as a path: `./a=b.yaml`.
    """
    first = next((place for place, word in enumerate(words) if _is_override(word)), len(words))
    return CommandLine(tuple(words[:first]), tuple(words[first:]))


def _is_override(word: str) -> bool:
    name, separator, _ = word.partition("=")
    return bool(separator) and "/" not in name


def parse(arguments: Sequence[str] | None = None) -> CommandLine:
    """Reads `arguments`, by default those of the process.

    Raises:
        SystemExit: `--help` or `--version` was answered (status 0), or the arguments are wrong (status 2).
    """
    parser = ArgumentParser(prog="pretrain_lens.py", usage=USAGE, add_help=False)
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="WORD", action=_Help)
    parser.add_argument("--version", action="version", version=f"lens_megatron {lens_megatron.__version__}")
    parser.add_argument("--config", required=True, nargs="+", action="extend", help="YAML files; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.option=value")
    parsed = parser.parse_args(arguments)
    found = split(parsed.config)
    if not found.files:
        parser.error(f"--config needs a file before {found.overrides[0]}")
    return CommandLine(found.files, (*parsed.overrides, *found.overrides))


class _Help(Action):
    """Prints the options that a word asks for, and ends the process."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        word = values if isinstance(values, str) else ""
        found = option_help.find(word)
        parts = [option_help.render(found)] * bool(found)
        if word and (not found or word.lower() in listing.names()) and (text := listing.find(word)):
            parts.append(text)
        if not parts:
            near = option_help.nearest(word) or listing.nearest(word)
            hint = f"did you mean {near}?" if near else "--help lists all of them"
            parser.error(f"no section, option or method has {word!r} in its name or meaning; {hint}")
        introduction = "" if word else f"usage: {USAGE}\n{INTRODUCTION}\n"
        try:
            print(introduction + "\n\n".join(parts), flush=True)
        except BrokenPipeError:  # the user left a pager early; Python would report it again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()
