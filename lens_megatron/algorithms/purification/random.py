"""Random pruning: deletes as many tokens as LENS would, drawn at random (LENS, appendix E)."""

from random import Random

from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.purification import Deletion, PromptEvidence, deletion_count
from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt


def random(
    prompt: Prompt, evidence: PromptEvidence, lens: LensConfig, seed: int, options: NoOptions
) -> Deletion | None:
    """Deletes k eligible tokens, each set of k with the same probability; k is that of `interference`.

    The numbers of the deletion are what each token drew from [0, 1) by `seed`: the k eligible tokens with the highest
    are deleted. There is no noise floor, so None is returned only where no token is eligible.
    """
    generator = Random(seed)
    draws = tuple(generator.random() for _ in prompt.token_ids)
    eligible = (place for place, may_go in enumerate(prompt.eligible) if may_go)
    by_draw = sorted(eligible, key=lambda place: draws[place], reverse=True)
    deleted = by_draw[: deletion_count(prompt.eligible, lens)]
    return Deletion(tuple(sorted(deleted)), draws) if deleted else None


ENTRY = Entry(random, paper="LENS, arXiv 2601.21244, appendix E")
