"""Finds out which part of `lens-eval` is asked for; evaluation.py describes all of them."""

import sys
from collections.abc import Sequence

from lens_megatron.errors import UserError
from lens_megatron.evaluation.protocols import NAMED, describe
from lens_megatron.output import console


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the words say, by default those of the process; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with console.messages_on_console():
            return _dispatch(words)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was graded is kept, and the same command goes on from there", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else ""
    # Each part is imported when it is asked for: an engine takes seconds to import, and a comparison needs none.
    if command == "compare":
        from lens_megatron.tools.evaluate import compare

        return compare.main(words[1:])
    if command == "regrade":
        from lens_megatron.tools.evaluate import regrade

        return regrade.main(words[1:])
    if command == "overlap":
        from lens_megatron.tools.evaluate import overlaps

        return overlaps.main(words[1:])
    if command == "protocols":
        print("\n".join(describe(protocol) for protocol in NAMED.values()))
        return 0
    from lens_megatron.tools.evaluate import evaluation

    return evaluation.main(words)


if __name__ == "__main__":
    sys.exit(main())
