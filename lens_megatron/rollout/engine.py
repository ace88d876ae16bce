"""The protocol every rollout engine speaks: submit requests, step, poll what finished, load weights.

An engine samples token ids from token ids. It knows nothing of prompts, groups, rewards or purification.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample."""

    request_id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    """0: greedy."""
    seed: int
    """The completion is a function of weights, prompt, temperature and seed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine made of a request."""

    request_id: int
    token_ids: tuple[int, ...]
    """Generated tokens, the end-of-sequence token included when it was generated."""
    log_probs: tuple[float, ...]
    """Natural log-probability of each sampled token under the distribution it was drawn from."""
    finished: bool
    """True: ended by an end-of-sequence token; False: cut at max_new_tokens."""
    weight_version: int


@dataclass(frozen=True, slots=True)
class EngineProgress:
    waiting: int
    running: int
    generated_tokens: int
    """Since the engine was made."""


class WeightManifestError(RuntimeError):
    """The streamed weights are not exactly the engine's: names missing, unknown, duplicate, or of another shape."""


class RolloutEngine(Protocol):
    def submit(self, requests: Iterable[Request]) -> None:
        """Queues requests. Raises ValueError for an empty prompt or one that cannot fit the model's context."""

    def step(self) -> list[Completion]:
        """Decodes one token for the running sequences and returns those that ended. Empty when idle."""

    def cancel(self, request_ids: Collection[int]) -> int:
        """Forgets requests in flight; `step` never returns them. Returns the number of tokens they had generated.

        Only `rollout.schedule=speculative` calls it.
        """

    def progress(self) -> EngineProgress: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights by the named ones (Hugging Face names), each exactly once.

        Raises WeightManifestError, before any request can be served with the mixture.
        """

    def sleep(self) -> None:
        """Gives up memory that training can use. A no-op where there is none to give."""

    def wake(self) -> None: ...

    def close(self) -> None: ...
