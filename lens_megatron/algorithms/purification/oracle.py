"""Oracle pruning: deletes exactly what the data marks as noise, an upper bound for every method that has to guess."""

from lens_megatron.algorithms.entry import Entry, Evidence, NoOptions
from lens_megatron.algorithms.purification import Deletion, PromptEvidence
from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt


def oracle(
    prompt: Prompt, evidence: PromptEvidence, lens: LensConfig, seed: int, options: NoOptions
) -> Deletion | None:
    """Deletes the eligible tokens that `data.noise_key` marks, however many they are.

    The numbers of the deletion are 1 where the data marks a token as noise, else 0. Returns None where no eligible
    token is marked.
    """
    marks = prompt.noise or (False,) * len(prompt.token_ids)
    rows = enumerate(zip(marks, prompt.eligible, strict=True))
    deleted = tuple(place for place, (marked, may_go) in rows if marked and may_go)
    return Deletion(deleted, tuple(map(float, marks))) if deleted else None


ENTRY = Entry(oracle, paper="this project", needs=frozenset({Evidence.NOISE_MARKS}))
