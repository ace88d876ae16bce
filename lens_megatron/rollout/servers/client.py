"""Talks to one vLLM server over HTTP and checks its answers. Only tokens travel, so no tokenizer is needed.

Completions come from /inference/v1/generate, which says with which weights each token was sampled. The control
endpoints exist only in vLLM's development mode.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from lens_megatron.rollout.engine import Completion, Request

UNLOADED = "default"
"""The version that a server names which was never given weights."""


class ServerError(RuntimeError):
    """A server did not answer, or not with what was asked for; the message says which."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status
        """The HTTP status, where the server answered with another one than 200."""


class OtherVersionError(ServerError):
    """A server sampled with other weights than those last loaded."""


@dataclass(frozen=True, slots=True)
class Client:
    """Calls one server's endpoints; each method raises ServerError where the server does not answer as it should."""

    address: str
    """http://host:port. The host has no meaning where the session's connections go to a Unix socket."""
    session: aiohttp.ClientSession
    """Its headers have the server's key."""

    @property
    def host_and_port(self) -> tuple[str, int]:
        parts = urlsplit(self.address)
        if parts.hostname is None or parts.port is None:
            raise ServerError(f"{self.address} is not http://host:port; correct rollout.servers")
        return parts.hostname, parts.port

    async def _call(self, method: str, path: str, timeout_s: float | None, body: Mapping | None = None) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=30)
        try:
            async with self.session.request(method, self.address + path, json=body, timeout=timeout) as reply:
                content = await reply.read()
        except TimeoutError:
            raise ServerError(f"{self.address}{path} gave no answer in {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{self.address}{path}: {error or type(error).__name__}") from None
        if reply.status != 200:
            said = content[:300].decode(errors="replace")
            raise ServerError(f"{self.address}{path} answered {reply.status}: {said}", reply.status)
        return content

    async def _json(self, method: str, path: str, timeout_s: float | None, body: Mapping | None = None) -> Any:
        content = await self._call(method, path, timeout_s, body)
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(f"{self.address}{path} answered what is not JSON: {content[:80]!r}") from None

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        reply = await self._json("GET", path, timeout_s)
        if not isinstance(reply, dict):
            raise ServerError(f"{self.address}{path} answered {str(reply)[:80]}")
        return reply

    async def post(self, path: str, timeout_s: float | None, body: Mapping | None = None) -> Any:
        """Returns the answer, any JSON. With `timeout_s` None it waits as long as the connection holds."""
        return await self._json("POST", path, timeout_s, body or {})

    async def tokens(self, timeout_s: float) -> float:
        """Returns the number of tokens that it has read and generated since it was started."""
        text = (await self._call("GET", "/metrics", timeout_s)).decode(errors="replace")
        values = re.findall(r"^vllm:(?:generation|prompt)_tokens_total(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
        try:
            return sum(map(float, values))
        except ValueError:
            raise ServerError(f"{self.address}/metrics: {values} are not numbers") from None

    async def version(self, timeout_s: float) -> str:
        """Returns the label of the weights that it has, as it was given them."""
        return str((await self.get("/weight_info", timeout_s)).get("weight_version"))

    async def reset_prefix_cache(self, timeout_s: float) -> None:
        if (await self.post("/reset_prefix_cache", timeout_s)) != {"success": True}:
            raise ServerError(f"{self.address} would not drop the keys and values of the old weights")


def generate_body(request: Request, end_tokens: Collection[int]) -> dict[str, Any]:
    """Returns the body of a call of /inference/v1/generate for `request`."""
    return {
        "token_ids": list(request.prompt),
        "sampling_params": {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "seed": request.seed,
            "max_tokens": request.max_new_tokens,
            "logprobs": 0,  # the sampled token's alone
            "stop_token_ids": sorted({*end_tokens, *request.stop}),
            "ignore_eos": True,  # the server knows only those of config.json; the project's are in stop_token_ids
            "detokenize": False,
        },
    }


@dataclass(frozen=True, slots=True)
class Expected:
    """Holds what every completion must agree with."""

    vocabulary: int
    end_tokens: frozenset[int]
    label: str
    """The server's name for `version`."""
    version: int


def completion_of(reply: Any, request: Request, expected: Expected) -> Completion:
    """Returns the completion in an answer of /inference/v1/generate, after everything in it was checked.

    Raises:
        OtherVersionError: some token was sampled with other weights than `expected.label`.
        ServerError: it is not a completion of the request.
    """
    try:
        (choice,) = reply["choices"]
        tokens, reason, spans = choice["token_ids"], choice["finish_reason"], choice["weight_versions"]
        entries = [(entry["token_id"], entry["logprob"]) for entry in choice["logprobs"]["content"]]
        versions = [(span["version"], span["start"], span["end"]) for span in spans]
        length = len(tokens)
    except (KeyError, TypeError, ValueError):
        raise ServerError(f"request {request.request_id}: not a completion: {str(reply)[:200]}") from None
    if versions != [(expected.label, 0, length)]:
        raise OtherVersionError(f"it sampled with weights {versions}, the trainer's are {expected.label}")
    wrong = _what_is_wrong(tokens, entries, reason, request, expected)
    if wrong:
        raise ServerError(f"request {request.request_id}: {wrong}")
    log_probs = tuple(float(log_prob) for _, log_prob in entries)
    return Completion(request.request_id, tuple(tokens), log_probs, reason == "stop", expected.version)


def _what_is_wrong(
    tokens: Any, entries: list[tuple[Any, Any]], reason: Any, request: Request, expected: Expected
) -> str | None:
    if not isinstance(tokens, list) or not tokens:
        return "no tokens"
    if not all(type(token) is int and 0 <= token < expected.vocabulary for token in tokens):
        return f"tokens outside 0..{expected.vocabulary - 1}"
    if [token for token, _ in entries] != tokens:
        return f"{len(tokens)} tokens, and log-probabilities of {len(entries)} others"
    for _, log_prob in entries:
        if type(log_prob) not in (int, float) or not math.isfinite(log_prob) or not -9999 < log_prob <= 0:
            return f"a log-probability of {log_prob}"  # vLLM writes NaN as -9999
    ends = [place for place, token in enumerate(tokens) if token in expected.end_tokens or token in request.stop]
    if reason == "stop" and ends == [len(tokens) - 1] and len(tokens) <= request.max_new_tokens:
        return None
    if reason == "length" and not ends and len(tokens) == request.max_new_tokens:
        return None
    return f"ended with {reason!r} after {len(tokens)} of {request.max_new_tokens} tokens, end tokens at {ends}"
