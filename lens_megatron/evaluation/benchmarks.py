"""Names the benchmarks of the paper, finds their data, and reads it into `EvalProblem`s.

Nothing is downloaded by this module itself and no data is part of the project: a benchmark is a file of the user's
(rows with problem and answer), or a dataset of the Hugging Face hub. docs/EVALUATION.md lists the known defects of each
set.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron.config import ConfigError, DataConfig
from lens_megatron.data.datasets import DataError, Record, read_records
from lens_megatron.reward import rows

_ENDINGS = (".jsonl", ".parquet")
_ID_KEYS = ("id", "unique_id", "idx", "problem_idx")
_SUBJECT_KEYS = ("subject", "subfield", "type", "course")
_LEVEL_KEYS = ("level", "difficulty")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set of problems that papers report on."""

    name: str
    title: str
    """Its column in tables."""
    aliases: tuple[str, ...] = ()
    """Other names of its file."""
    hub: str | None = None
    """The dataset of the hub, `name:split`; None where its rows need a conversion first."""


PAPER = (
    Benchmark("math500", "MATH500", ("math_500", "math-500"), "HuggingFaceH4/MATH-500:test"),
    Benchmark("amc23", "AMC23", ("amc2023",), "math-ai/amc23:test"),
    Benchmark("aime24", "AIME24", ("aime2024", "aime_2024"), "HuggingFaceH4/aime_2024:train"),
    Benchmark("aime25", "AIME25", ("aime2025", "aime_2025"), "math-ai/aime25:test"),
    Benchmark("gaokao2023en", "GaoKao2023EN", ("gaokao", "gaokao2023_en"), "MARIO-Math-Reasoning/Gaokao2023-Math-En"),
    Benchmark("minerva", "Minerva", ("minerva_math", "minervamath"), "math-ai/minervamath:test"),
    Benchmark("olympiadbench", "OlympiadBench", ("olympiad_bench", "olympiad")),
)
"""The benchmarks of the LENS paper (arXiv 2601.21244, Table 1) in the order of its columns."""
_BY_NAME = {name: benchmark for benchmark in PAPER for name in (benchmark.name, *benchmark.aliases)}


@dataclass(frozen=True, slots=True)
class EvalProblem:
    """A problem of a benchmark.

    Example: EvalProblem("amc23", "amc23/1", 0, "What is $1+1$?", "2", "", "", "").
    """

    benchmark: str
    id: str
    """Unique within the benchmark: that of the row, else the row's number from 0."""
    index: int
    """The row, counted from 0."""
    problem: str
    """The user's text, without template and instruction."""
    answer: str
    subject: str
    """Empty where the data has none; so is the level."""
    level: str
    record: str
    """The row as `reward.rows.encode` writes it, for graders that look at its columns."""


def canonical_name(name: str) -> str:
    """Returns the name under which protocols and tables know a benchmark: `minerva_math` is `minerva`."""
    found = _BY_NAME.get(name.lower())
    return found.name if found else name


def title_of(name: str) -> str:
    """Returns the benchmark's column in tables; other sets have their own names."""
    found = _BY_NAME.get(name)
    return found.title if found else name


def in_paper_order(names: Sequence[str]) -> list[str]:
    """Returns the names in the order of the paper's columns; others follow in their own order."""
    order = [benchmark.name for benchmark in PAPER]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


@dataclass(frozen=True, slots=True)
class DataPlaces:
    """Where the user keeps data: folders, and files or datasets by the names of benchmarks."""

    folders: tuple[Path, ...] = ()
    named: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> "DataPlaces":
        """Reads `--data` words: DIR, or name=FILE, or name=DATASET:SPLIT. Raises ConfigError."""
        folders, named = [], []
        for word in words:
            name, separator, path = word.partition("=")
            if separator and "/" not in name:
                if not name or not path:
                    raise ConfigError(f"--data {word}: expected a folder or name=path")
                named.append((canonical_name(name), path))
            elif not Path(word).expanduser().is_dir():
                raise ConfigError(f"--data {word}: no such folder; give a folder with NAME.jsonl files, or name=path")
            else:
                folders.append(Path(word).expanduser())
        return cls(tuple(folders), tuple(named))

    def find(self, name: str) -> str:
        """Returns the file or hub dataset of a benchmark. Raises ConfigError, which says where it looked."""
        for known, path in self.named:
            if known == name:
                return path
        benchmark = _BY_NAME.get(name)
        stems = (name, *benchmark.aliases) if benchmark else (name,)
        for folder in self.folders:
            for file in (folder / f"{stem}{ending}" for stem in stems for ending in _ENDINGS):
                if file.is_file():
                    return str(file)
        if benchmark and benchmark.hub:
            return benchmark.hub
        looked = " or ".join(str(folder / f"{name}.jsonl") for folder in self.folders) or "no folder (--data DIR)"
        known_names = ", ".join(known.name for known in PAPER)
        raise ConfigError(
            f"benchmark {name}: no data: looked for {looked}; give --data {name}=FILE with rows of problem and answer"
            + ("" if benchmark else f" (benchmarks with names: {known_names})")
        )


def read_problems(
    name: str, source: str, *, data: DataConfig | None = None, limit: int | None = None
) -> tuple[EvalProblem, ...]:
    """Reads a file or hub dataset as the benchmark `name`.

    A row may be a conversation with one user turn. Its system turn is not used: that is the protocol's.

    Args:
        data: names the columns of problem and answer, if they have other names.
        limit: keeps the first problems only.

    Raises DataError for what cannot be read, a row with several user turns, or two rows with one id.
    """
    records = read_records(source, data or DataConfig(train=source), whole_rows=True)
    problems = tuple(_problem(name, record) for record in records)
    (most, count), *_ = Counter(problem.id for problem in problems).most_common(1)
    if count > 1:
        raise DataError(f"{source}: {count} rows have the id {most!r}; give every row its own, or none to all")
    return problems[:limit]


def _problem(name: str, record: Record) -> EvalProblem:
    turns = [message for message in record.messages if message.role != "system"]
    if len(turns) != 1:
        raise DataError(f"{record.where}: {len(turns)} turns; a problem of a benchmark is one turn of the user")
    columns = rows.decode(record.row).columns
    return EvalProblem(
        benchmark=name,
        id=_text(columns, _ID_KEYS) or str(record.index),
        index=record.index,
        problem=turns[0].content,
        answer=record.answer,
        subject=_text(columns, _SUBJECT_KEYS),
        level=_text(columns, _LEVEL_KEYS),
        record=record.row,
    )


def _text(columns: Mapping[str, Any], keys: Sequence[str]) -> str:
    found = next((columns[key] for key in keys if columns.get(key) not in (None, "")), "")
    return str(found)


def digest(problems: Sequence[EvalProblem]) -> str:
    """Returns 16 hexadecimal digits that change with any id, problem or answer, and with their order."""
    content = json.dumps([(problem.id, problem.problem, problem.answer) for problem in problems], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
