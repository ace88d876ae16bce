"""Samples with transformers in this process, with a KV cache, continuous batching and a seed per request.

A completion is a function of weights, prompt, temperature and seed, up to the rounding of batched matrix products; and
nothing here reads a clock, so equal calls give equal bits.
"""

from collections import deque
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lens_megatron.data.model_files import configured_end_tokens
from lens_megatron.rollout.engine import Completion, EngineProgress, Request, WeightManifest, check_request
from lens_megatron.rollout.narrowing import certainty, narrowed


@dataclass(slots=True)
class _Sequence:
    request: Request
    uniforms: Tensor
    """[max_new_tokens] float64, one draw from [0, 1) per token."""
    token_ids: list[int]
    log_probs: list[float]
    certainty: float = 0.0
    """The sum over the tokens so far; 0 unless it was asked for."""


class LocalEngine:
    """Implements `RolloutEngine` for Qwen2, Qwen3, Qwen3-MoE and Llama models. Weights come by `load_weights` only."""

    def __init__(
        self,
        model_path: str,
        *,
        max_running_sequences: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):
        self.config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa")
        self.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.eos = torch.tensor(sorted(end_tokens(model_path)), device=self.device)
        self.max_running_sequences = max_running_sequences
        self.version: int | None = None
        self.waiting: deque[_Sequence] = deque()
        self.running: list[_Sequence] = []
        self.generated = 0
        self._reset()

    def _reset(self) -> None:
        self.cache: list[tuple[Tensor, Tensor]] = []  # per layer, [B, heads, S, head_dim], left-padded
        self.mask = torch.zeros(0, 0, dtype=torch.int64, device=self.device)  # [B, S], 1 at real tokens

    def phase(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self._whole_version()
        in_flight = {s.request.request_id for s in (*self.waiting, *self.running)}
        context = ("the model's max_position_embeddings", self.config.max_position_embeddings)
        for request in requests:
            check_request(request, in_flight, context=context, vocabulary=self.config.vocab_size)
            in_flight.add(request.request_id)
        for request in requests:
            generator = torch.Generator().manual_seed(request.seed)
            uniforms = torch.rand(request.max_new_tokens, generator=generator, dtype=torch.float64)
            self.waiting.append(_Sequence(request, uniforms, [], []))

    def _whole_version(self) -> int:
        """The version of its weights. Raises RuntimeError unless it has a whole set."""
        if self.version is None:
            raise RuntimeError("the engine has no whole set of weights; load_weights first")
        return self.version

    def capacity(self) -> int:
        return self.max_running_sequences

    def hopeless(self) -> bool:
        return False

    def returned(self) -> list[Request]:
        return []

    def progress(self) -> EngineProgress:
        return EngineProgress(len(self.waiting), len(self.running), self.generated)

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Admits the requests that fit, then adds one token to every running sequence."""
        logits = self._decode() if self.running else None
        admitted = [
            self.waiting.popleft()
            for _ in range(min(len(self.waiting), self.max_running_sequences - len(self.running)))
        ]
        if admitted:
            first = self._prefill(admitted)
            logits = first if logits is None else torch.cat([logits, first])
            self.running += admitted
        if logits is None:
            return []
        self._sample(logits)
        return self._retire()

    def _decode(self) -> Tensor:
        """Returns [B, V] logits of the next token of the sequences that were running."""
        tokens = torch.tensor([[s.token_ids[-1]] for s in self.running], device=self.device)
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        return self._forward(tokens, positions, self.mask, self.cache)

    def _prefill(self, admitted: list[_Sequence]) -> Tensor:
        """Returns [admitted, V] logits after the prompts; equal prompts are computed once. Joins the running cache."""
        prompts = list(dict.fromkeys(s.request.prompt for s in admitted))
        rows = torch.tensor([prompts.index(s.request.prompt) for s in admitted], device=self.device)
        length = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), length, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.tensor(prompt, device=self.device)
            mask[row, length - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        kept, self.cache = self.cache, []
        logits = self._forward(tokens, positions, mask, [])
        fresh = [(keys[rows], values[rows]) for keys, values in self.cache]
        self.cache = [_join(old, new) for old, new in zip(kept, fresh, strict=True)] if kept else fresh
        self.mask = _join_rows(self.mask, mask[rows], dim=1) if kept else mask[rows]
        return logits[rows]

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        cache = DynamicCache(past) if past else DynamicCache()
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = [(layer.keys, layer.values) for layer in cache.layers]
        return output.logits[:, -1]

    def _sample(self, logits: Tensor) -> None:
        temperatures = torch.tensor([s.request.temperature for s in self.running], device=self.device)
        greedy = temperatures == 0
        scaled = logits.float() / torch.where(greedy, 1.0, temperatures)[:, None]
        log_probs = self._narrow(scaled.log_softmax(-1))
        uniforms = torch.stack([s.uniforms[len(s.token_ids)] for s in self.running]).to(self.device)
        cumulative = log_probs.double().exp().cumsum(-1)
        # Scaled by the total, so that rounding of the sum can never put a draw past the last token of non-zero mass.
        drawn = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
        tokens = torch.where(greedy[:, None], log_probs.argmax(-1, keepdim=True), drawn.clamp(max=logits.shape[1] - 1))
        chosen = log_probs.gather(1, tokens)[:, 0].tolist()
        for sequence, token, log_prob in zip(self.running, tokens[:, 0].tolist(), chosen, strict=True):
            sequence.token_ids.append(token)
            sequence.log_probs.append(log_prob)
        self._note_certainty(logits)
        self.generated += len(self.running)

    def _narrow(self, log_probs: Tensor) -> Tensor:
        """Narrows the distributions of the sequences that ask for it; the others are not sorted."""
        rows = [row for row, s in enumerate(self.running) if s.request.top_p < 1 or s.request.top_k]
        if rows:
            asked = [self.running[row].request for row in rows]
            top_p = torch.tensor([r.top_p for r in asked], dtype=torch.float64, device=self.device)
            top_k = torch.tensor([r.top_k for r in asked], device=self.device)
            log_probs[rows] = narrowed(log_probs[rows], top_p, top_k)
        return log_probs

    def _note_certainty(self, logits: Tensor) -> None:
        rows = [row for row, s in enumerate(self.running) if s.request.certainty]
        if rows:
            values = certainty(logits[rows].float().log_softmax(-1)).tolist()
            for row, value in zip(rows, values, strict=True):
                self.running[row].certainty += value

    def _retire(self) -> list[Completion]:
        """Takes the sequences that ended out of the batch and of the cache, and returns their completions."""
        eos = set(self.eos.tolist())
        completions, staying = [], []
        for row, sequence in enumerate(self.running):
            finished = sequence.token_ids[-1] in eos or sequence.token_ids[-1] in sequence.request.stop
            if finished or len(sequence.token_ids) == sequence.request.max_new_tokens:
                completions.append(_completion(sequence, finished, self._whole_version()))
            else:
                staying.append(row)
        if not completions:
            return []
        self._keep(staying)
        return completions

    def _keep(self, staying: list[int]) -> None:
        """Keeps only these rows of the batch and of the cache."""
        self.running = [self.running[row] for row in staying]
        if not staying:
            self._reset()
            return
        rows = torch.tensor(staying, device=self.device)
        self.mask = self.mask[rows]
        padding = int(self.mask.any(0).int().argmax())  # only retired sequences had used these columns
        self.mask = self.mask[:, padding:]
        self.cache = [(keys[rows, :, padding:], values[rows, :, padding:]) for keys, values in self.cache]

    def cancel(self, request_ids: Collection[int]) -> int:
        gone = set(request_ids)
        self.waiting = deque(s for s in self.waiting if s.request.request_id not in gone)
        staying = [row for row, s in enumerate(self.running) if s.request.request_id not in gone]
        tokens = sum(len(s.token_ids) for s in self.running if s.request.request_id in gone)
        if len(staying) < len(self.running):
            self._keep(staying)
        return tokens

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.waiting or self.running:
            raise RuntimeError(f"cannot load weights with {len(self.waiting) + len(self.running)} requests in flight")
        self.version = None  # until every tensor is there the model is a mixture
        self._reset()
        parameters = checkpoint_weights(self.model)
        manifest = WeightManifest({name: parameter.shape for name, parameter in parameters.items()})
        for name, tensor in weights:
            if manifest.accepts(name, tensor):
                parameters[name].copy_(tensor)
        manifest.check(version)
        self.version = version

    def wake(self) -> None:
        pass

    def sleep(self) -> None:
        if not self.running:
            self._reset()

    def close(self) -> None:
        self.waiting.clear()
        self.running.clear()
        self._reset()


def checkpoint_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the model's weights, to be written to, by the names that they have in checkpoints.

    In checkpoints every expert has its own matrices; transformers keeps those of a layer together: `gate_up_proj`
    [experts, 2 I, D] and `down_proj` [experts, D, I], where I is the intermediate size.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer, together, matrix = name.rpartition(".experts.")
        if not together:
            weights[name] = parameter
            continue
        names = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
        for expert, own in enumerate(parameter):
            parts = zip(names, own.chunk(len(names)), strict=True)
            weights |= {f"{layer}.experts.{expert}.{part}.weight": tensor for part, tensor in parts}
    return weights


def _join(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return _join_rows(old[0], new[0], dim=2), _join_rows(old[1], new[1], dim=2)


def _join_rows(old: Tensor, new: Tensor, dim: int) -> Tensor:
    """Stacks two tensors along dimension 0, after padding the shorter one with zeros at the front of `dim`."""
    length = max(old.shape[dim], new.shape[dim])
    after = 2 * (old.dim() - 1 - dim)
    padded = [torch.nn.functional.pad(t, (0,) * after + (length - t.shape[dim], 0)) for t in (old, new)]
    return torch.cat(padded)


def _completion(sequence: _Sequence, finished: bool, version: int) -> Completion:
    request, tokens = sequence.request, tuple(sequence.token_ids)
    mean = sequence.certainty / len(tokens) if request.certainty else None
    return Completion(request.request_id, tokens, tuple(sequence.log_probs), finished, version, mean)


def end_tokens(model_path: str) -> set[int]:
    """Returns the ids that end a completion, by the generation configuration and the tokenizer. Raises ModelError."""
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    return configured_end_tokens(model_path) | ({tokenizer.eos_token_id} - {None})
