"""Describes every method, every closed table and every file of configs/methods, for `--help` and docs/METHODS.md."""

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path

from lens_megatron.algorithms import registry
from lens_megatron.algorithms.registry import Kind
from lens_megatron.config import help as option_help
from lens_megatron.config.help import OptionHelp

CHOSEN_BY = {
    Kind.SELECTION: ("selection.method", "selection.options"),
    Kind.PURIFICATION: ("lens.purifier", "lens.purifier_options"),
    Kind.REWARDS: ("reward.rules", "reward.rules.{name}"),
    Kind.ADVANTAGES: ("algorithm.advantage", "algorithm.advantage_options"),
    Kind.OBJECTIVES: ("algorithm.objective", "algorithm.objective_options"),
}
"""The option that names a method of the kind, and where the method's own options stand."""
MEANING = {
    Kind.SELECTION: "which prompts a step samples, and on which of their groups it trains",
    Kind.PURIFICATION: "which tokens of a hard prompt are deleted before it is sampled again",
    Kind.REWARDS: "how the rewards of training rollouts change before it is decided which prompts are hard",
    Kind.ADVANTAGES: "how the rollouts of a group are judged",
    Kind.OBJECTIVES: "the loss of a token with a given ratio",
}
CLOSED = (
    "algorithm.aggregation",
    "algorithm.correction",
    "algorithm.ratio",
    "algorithm.rescued_ratio",
    "algorithm.weights",
)
"""Options with a closed table of choices."""
FILES = Path(__file__).resolve().parents[2] / "configs" / "methods"
"""Each file begins with a comment that says what it is. Where the package is installed without them there are none."""
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class MethodHelp:
    """Describes one method."""

    kind: Kind
    name: str
    summary: str
    """The first paragraph of the docstring."""
    paper: str
    options: tuple[OptionHelp, ...]
    """The method's own, under the names that they have in a configuration."""
    needs: tuple[str, ...]
    """What is computed for it (`Evidence`)."""


@dataclass(frozen=True, slots=True)
class MethodFile:
    """Describes one file of configs/methods."""

    name: str
    line: str
    """The file's first line, without the name."""


def methods(kind: Kind) -> list[MethodHelp]:
    """Returns all methods of a kind that ship with the project, by name. Imports them, and torch with them."""
    return [_describe(kind, name) for name in registry.names(kind)]


def _describe(kind: Kind, name: str) -> MethodHelp:
    entry = registry.find(kind, name, CHOSEN_BY[kind][0])
    prefix = CHOSEN_BY[kind][1].format(name=name)
    own = tuple(option_help.describe(f"{prefix}.{key}", field) for key, field in entry.options.model_fields.items())
    summary = " ".join((getdoc(entry.call) or "").split("\n\n")[0].split())
    return MethodHelp(kind, name, summary, entry.paper, own, tuple(sorted(entry.needs)))


def files() -> list[MethodFile]:
    """Returns the files of configs/methods by name, each with what its first line says."""
    found = []
    for path in sorted(FILES.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append(MethodFile(path.stem, first.removeprefix("#").strip().removeprefix(f"{path.stem}: ")))
    return found


def closed_tables() -> list[OptionHelp]:
    """Returns the options whose choices are closed tables."""
    return [option for section in option_help.sections() for option in section.options if option.name in CLOSED]


def names() -> list[str]:
    """Returns what `find` knows: kinds, methods and files. Imports no method."""
    every = [*Kind, *(name for kind in Kind for name in registry.names(kind)), *(file.name for file in files())]
    return sorted(set(map(str, every)))


def nearest(word: str) -> str:
    """Returns the kind, method or file whose name is most like `word`; empty if none is."""
    near = difflib.get_close_matches(word.lower(), names(), n=1)
    return near[0] if near else ""


def find(word: str) -> str:
    """Returns text about the kind, the methods and the file called `word`, or if there are none about the methods that
    have an option of this name.

    The text is for a terminal, at most 110 columns wide; it is empty if nothing is found. An empty word is everything.
    """
    sought = word.lower()
    parts = [_kind_text(kind) for kind in Kind if sought in ("", kind)]
    parts += [_method_text(_describe(kind, sought)) for kind in Kind if sought in registry.names(kind)]
    if chosen := [file for file in files() if sought in ("", file.name)]:
        parts.append("\n".join(["configs/methods:", *(_file_text(file) for file in chosen)]))
    if not sought:
        parts.append("\n".join(["closed tables:", *_indented_options(closed_tables())]))
    if not parts:
        every = [method for kind in Kind for method in methods(kind)]
        parts = [_method_text(method) for method in every if _has_option(method, sought)]
    return "\n\n".join(parts)


def _has_option(method: MethodHelp, word: str) -> bool:
    return any(word in (option.name.lower(), option.name.lower().rpartition(".")[2]) for option in method.options)


def _kind_text(kind: Kind) -> str:
    head = f"{kind} ({CHOSEN_BY[kind][0]}): {MEANING[kind]}"
    return "\n".join([head, *(textwrap.indent(_method_text(method), "  ") for method in methods(kind))])


def _method_text(method: MethodHelp) -> str:
    option = CHOSEN_BY[method.kind][0]
    chosen = f"{option}.{method.name}" if method.kind is Kind.REWARDS else f"{option}={method.name}"
    facts = [f"needs {', '.join(method.needs)}"] if method.needs else []
    head = f"{method.name}  ({'; '.join([method.kind, chosen, *facts, method.paper])})"
    return "\n".join([*_wrapped(head, 0, 8), *_wrapped(method.summary, 2, 2), *_indented_options(method.options)])


def _file_text(file: MethodFile) -> str:
    return "\n".join(_wrapped(f"{file.name}.yaml  {file.line}", 2, 8))


def _indented_options(options: Sequence[OptionHelp]) -> Iterator[str]:
    for option in options:
        yield from _wrapped(f"{option.name}  ({option.type}; default {option.default})", 4, 10)
        yield from _wrapped(" ".join(option.meaning.split()), 8, 8)


def _wrapped(text: str, first: int, rest: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * first, subsequent_indent=" " * rest)


def markdown() -> str:
    """Returns docs/METHODS.md, which a test compares with this."""
    lines = [
        "# Methods",
        "",
        "This page is made by `python -m lens_megatron.algorithms --markdown > docs/METHODS.md`; a test fails while it",
        "is out of date. [CONTRIBUTING.md](../CONTRIBUTING.md) shows how to add a method.",
        "",
        "## Files",
        "",
        "Each file makes a method of any base: `--config configs/demo.yaml configs/methods/dapo.yaml`. Those that only",
        "change rewards stand after the file of a method.",
        "",
        "| file of `configs/methods/` | what it is |",
        "|---|---|",
        *(f"| [{file.name}](../configs/methods/{file.name}.yaml) | {_cell(file.line)} |" for file in files()),
    ]
    for kind in Kind:
        lines += ["", f"## {kind.capitalize()}", "", *_kind_table(kind)]
    lines += ["", "## Closed tables", "", "| option | choices | meaning |", "|---|---|---|"]
    lines += [f"| `{o.name}` | {_cell(o.type)} | {_cell(o.meaning)} |" for o in closed_tables()]
    return "\n".join(lines) + "\n"


def _kind_table(kind: Kind) -> Iterator[str]:
    option, own = CHOSEN_BY[kind]
    yield f"`{option}` says {MEANING[kind]}. Own options stand under `{own.replace('{name}', 'NAME')}`."
    yield from ("", "| name | what it does | own options | needs | paper |", "|---|---|---|---|---|")
    for method in methods(kind):
        options = "<br>".join(_option_cell(option) for option in method.options)
        needs = ", ".join(method.needs)
        yield f"| `{method.name}` | {_cell(method.summary)} | {options} | {needs} | {_cell(method.paper)} |"


def _option_cell(option: OptionHelp) -> str:
    name = option.name.rpartition(".")[2]
    return _cell(f"`{name}` ({option.type}; default {option.default}): {option.meaning}")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
