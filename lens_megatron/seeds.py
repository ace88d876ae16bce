"""Derives the seed of each random choice from the run's seed and its purpose; resuming needs no generator's state."""

import hashlib


def derive(*parts: int | str) -> int:
    """Returns a 63-bit seed from `parts`, e.g. derive(run_seed, "native", step, place, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
