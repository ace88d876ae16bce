"""Defines the protocol of every rollout engine: submit requests, step, poll what finished, load weights.

An engine samples token ids from token ids. It knows nothing of prompts, groups, rewards or purification.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lens_megatron.errors import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one completion."""

    request_id: int
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int
    temperature: float
    """0 means that every token is the most probable one."""
    seed: int
    """The completion is a function of weights, prompt, seed, and what says how it is sampled."""
    top_p: float = 1.0
    """Only the most probable tokens with at least this probability together are drawn from. Only evaluations narrow the
    distribution: the trainer's log-probabilities are of the whole one."""
    top_k: int = 0
    """Only this many most probable tokens are drawn from. 0: all."""
    stop: tuple[int, ...] = ()
    """Token ids that end the completion as the model's own end tokens do."""
    certainty: bool = False
    """Report `Completion.certainty`, if the engine can."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The completion that an engine sampled for a request."""

    request_id: int
    token_ids: tuple[int, ...]
    """Ids of the generated tokens; the end-of-sequence token is one of them if it was generated."""
    log_probs: tuple[float, ...]
    """The log-probability, in nats, of each sampled token under the distribution it was drawn from."""
    finished: bool
    """True when it ended with an end-of-sequence token, False when it was cut at `max_new_tokens`."""
    weight_version: int
    certainty: float | None = None
    """The mean self-certainty of the distributions at temperature 1, see `narrowing.certainty`. None unless it was
    asked for, and from engines that know only the probabilities of sampled tokens."""


@dataclass(frozen=True, slots=True)
class EngineProgress:
    """Counts an engine's requests and the tokens that it has generated."""

    waiting: int
    running: int
    generated_tokens: int
    """Tokens since the engine was made; an engine may count a completion's tokens only when it has ended."""


class WeightManifestError(RuntimeError):
    """The streamed weights are not exactly the engine's: names missing, unknown, duplicate, or of another shape."""


class EnginesLostError(UserError):
    """No engine is left that could serve what is asked for."""

    exit_code = ExitCode.ENGINES_LOST

    def __str__(self) -> str:
        return f"{super().__str__()}\nwhat was graded is kept: the same command goes on from there"


class WeightManifest:
    """Knows what a stream of weights must hold, and what was wrong with the part that has come.

    `shapes` are those of the engine's tensors, by their Hugging Face names.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self.shapes, self.missing = shapes, set(shapes)
        self.problems: list[str] = []

    def accepts(self, name: str, tensor: Tensor) -> bool:
        """Returns False where `tensor` must not be loaded; `check` will say why."""
        shape = self.shapes.get(name)
        if shape is None:
            self.problems.append(f"unknown {name}")
        elif name not in self.missing:
            self.problems.append(f"duplicate {name}")
        elif tuple(shape) != tuple(tensor.shape):
            self.problems.append(f"{name} has shape {tuple(tensor.shape)}, the engine's has {tuple(shape)}")
        else:
            self.missing.remove(name)
            return True
        return False

    def check(self, version: int) -> None:
        """Raises WeightManifestError unless every name has come, and nothing else."""
        problems = self.problems + [f"missing {name}" for name in sorted(self.missing)]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise WeightManifestError(f"weights of version {version}: {'; '.join(problems[:5])}{more}")


def check_request(request: Request, in_flight: Container[int], *, context: tuple[str, int], vocabulary: int) -> None:
    """Raises ValueError for a request that no engine can serve.

    Args:
        in_flight: the ids of the requests that the engine has already.
        context: the name of the limit for the tokens of prompt and completion together, and the limit itself.
        vocabulary: the number of token ids that the model knows.
    """
    name, limit = context
    if request.request_id in in_flight:
        raise ValueError(f"request {request.request_id} is in flight already; give every request its own id")
    if not request.prompt:
        raise ValueError(f"request {request.request_id}: the prompt is empty; give at least one token")
    if request.max_new_tokens < 1:
        raise ValueError(f"request {request.request_id}: max_new_tokens {request.max_new_tokens}; give at least 1")
    if len(request.prompt) + request.max_new_tokens > limit:
        raise ValueError(
            f"request {request.request_id}: prompt of {len(request.prompt)} + max_new_tokens "
            f"{request.max_new_tokens} exceeds {name} {limit}; shorten one"
        )
    if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
        raise ValueError(f"request {request.request_id}: token ids must lie in 0..{vocabulary - 1}")
    if request.temperature < 0:
        raise ValueError(f"request {request.request_id}: temperature {request.temperature}; give 0 or more")
    if not 0 < request.top_p <= 1 or request.top_k < 0:
        raise ValueError(
            f"request {request.request_id}: top_p {request.top_p}, top_k {request.top_k}; give a top_p above 0 and at "
            "most 1, and a top_k of 0 or more"
        )


class RolloutEngine(Protocol):
    """The interface of all engines, `local`, `vllm` and `servers`, to the rest of the program."""

    @property
    def version(self) -> int | None:
        """The version of the weights that it samples from; None while it has no whole set of weights."""

    def phase(self) -> AbstractContextManager[None]:
        """Requests are submitted, decoded and cancelled within this block only.

        Several ranks may hold one engine together. All of them enter the block, and only the first calls anything
        within it: the others do what it did while they enter, and find nothing to do within. So the block must hold no
        collective of all ranks. An error within the block leaves the other ranks waiting. Raises EngineGroupError, on
        all ranks of the engine, if they did not draw the same tokens.
        """

    def submit(self, requests: Iterable[Request]) -> None:
        """Queues requests. Raises ValueError for an empty prompt or one that cannot fit the model's context."""

    def step(self) -> list[Completion]:
        """Decodes one token of every running sequence and returns the completions that ended; none when idle."""

    def cancel(self, request_ids: Collection[int]) -> int:
        """Forgets requests in flight; `step` never returns them. Returns the number of tokens they had generated."""

    def returned(self) -> list[Request]:
        """Takes out the requests that this engine can no longer serve, to be given to another one.

        Only engines whose servers can die ever return any.
        """

    def capacity(self) -> int:
        """The number of sequences it can decode at once now; at 0 it serves none until weights are loaded again."""

    def hopeless(self) -> bool:
        """Returns whether it serves no request now and will serve none before weights are loaded again."""

    def progress(self) -> EngineProgress:
        """The number of its requests, and the number of tokens generated so far."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights by the named ones (Hugging Face names), each exactly once.

        Raises WeightManifestError, before any request can be served with a mixture of old and new weights.
        """

    def wake(self) -> None:
        """Takes the memory that sampling needs besides weights: after `load_weights`, before the next request.

        Nothing computed with earlier weights is used from then on. It does nothing while the engine is awake.
        """

    def sleep(self) -> None:
        """Gives up memory that training can use; if that of the weights too, `version` is None until they are loaded.

        It does nothing where there is no memory to give up, and while requests are in flight.
        """

    def close(self) -> None:
        """Forgets all requests and gives up all memory; the engine cannot be used any more."""
