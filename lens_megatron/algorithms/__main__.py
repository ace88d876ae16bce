"""Lists the methods: `python -m lens_megatron.algorithms [NAME | KIND]`, or `--markdown` for docs/METHODS.md."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from lens_megatron.algorithms import listing


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was asked for; returns the exit status: 0, or 2 where there is no such method."""
    parser = ArgumentParser(prog="python -m lens_megatron.algorithms", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("word", nargs="?", default="", metavar="NAME|KIND", help="everything, if there is none")
    parser.add_argument("--markdown", action="store_true", help="the page docs/METHODS.md")
    parsed = parser.parse_args(arguments)
    text = listing.markdown().rstrip("\n") if parsed.markdown else listing.find(parsed.word)
    if not text:
        near = listing.nearest(parsed.word)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(listing.names())}"
        print(f"error: no method and no kind of methods is called {parsed.word!r}; {hint}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
