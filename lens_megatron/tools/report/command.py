"""Makes an HTML report of one or more runs: `lens-report runs/mine`."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from lens_megatron.errors import UserError
from lens_megatron.files import write_atomically
from lens_megatron.output import report as text_report
from lens_megatron.output.console import print_text
from lens_megatron.tools.report.digest import RolloutReader
from lens_megatron.tools.report.page import make
from lens_megatron.tools.report.run_data import ReportError
from lens_megatron.tools.report.watch import watch

RELOAD_S = 20
"""A page that is watched loads itself again after so many seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report that `arguments` ask for, by default those of the process.

    Returns the exit status: 0, or 2 where a folder holds no run or the report cannot be written.
    """
    parsed = _parse(arguments)
    if parsed.text:
        return max(text_report.main([str(folder)]) for folder in parsed.runs)
    out = parsed.out or parsed.runs[0] / "report.html"
    reader = RolloutReader()

    def write(reload_seconds: int) -> None:
        _write(out, make(tuple(parsed.runs), reader, reload_seconds))

    try:
        if parsed.watch:
            print_text(f"{out} is written again whenever a run goes on; open it in a browser; Ctrl-C ends this")
            watch(parsed.runs, lambda: write(RELOAD_S))
        write(0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the report was not written", file=sys.stderr)
        return 130
    print_text(f"{out} ({out.stat().st_size / 1e6:.1f} MB) opens in any browser and needs no network")
    return 0


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="lens-report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run (its run.directory)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the HTML file; by default report.html in RUN")
    parser.add_argument("--watch", action="store_true", help="write it again whenever a run goes on, until Ctrl-C")
    parser.add_argument("--text", action="store_true", help="print a summary instead, and draw learning_curve.png")
    return parser.parse_args(arguments)


def _write(out: Path, page: str) -> None:
    try:
        write_atomically(out, page)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ReportError(f"{out} cannot be written: {why}; name another file with --out") from error


if __name__ == "__main__":
    sys.exit(main())
