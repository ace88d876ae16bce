"""`lens-eval overlap --train FILE --benchmarks NAME,...`: training problems that stand in benchmarks."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lens_megatron.config import ConfigError, DataConfig
from lens_megatron.data.datasets import read_records
from lens_megatron.evaluation.benchmarks import DataPlaces, canonical_name, read_problems
from lens_megatron.evaluation.overlap import THRESHOLD, find_overlaps, summary_lines
from lens_megatron.files import write_atomically


def main(words: Sequence[str]) -> int:
    """Prints the overlaps; the exit status is 0 whether or not there are any."""
    parser = ArgumentParser(prog="lens-eval overlap", description=__doc__)
    parser.add_argument("--train", required=True, help="a .jsonl or .parquet file, or a dataset, as data.train")
    parser.add_argument("--benchmarks", required=True, metavar="NAME,...", help="as for lens-eval")
    parser.add_argument("--data", action="append", default=[], metavar="DIR|NAME=FILE", help="as for lens-eval")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="SHARE", help="default: 0.5")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every overlap as JSON lines")
    parsed = parser.parse_args(words)
    if not 0 < parsed.threshold <= 1:
        parser.error(f"--threshold {parsed.threshold}: give more than 0 and at most 1")
    places = DataPlaces.parse(parsed.data)
    names = [canonical_name(name.strip()) for name in parsed.benchmarks.split(",") if name.strip()]
    problems = [problem for name in names for problem in read_problems(name, places.find(name))]
    records = read_records(parsed.train, DataConfig(train=parsed.train))
    texts = ("\n".join(message.content for message in record.messages) for record in records)
    found = find_overlaps(texts, problems, parsed.threshold)
    lines = summary_lines(found, problems, parsed.train, parsed.threshold)
    print("\n".join(lines) or f"no problem of {', '.join(names)} overlaps {parsed.train} by {parsed.threshold:.0%}")
    if parsed.out:
        try:
            write_atomically(parsed.out, "".join(json.dumps(asdict(overlap)) + "\n" for overlap in found))
        except OSError as error:
            raise ConfigError(f"--out {parsed.out}: {error.strerror}; choose another file") from error
    return 0
