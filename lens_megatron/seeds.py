"""Every random choice is a function of the run's seed and of what it is for, so resuming needs no generator's state."""

import hashlib


def derive(*parts: int | str) -> int:
    """A 63-bit seed from `parts`, e.g. derive(run_seed, "native", step, place, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
