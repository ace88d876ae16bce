"""Forward passes without gradients: log-probabilities of given tokens, over all micro-batches in one pipelined run."""

from collections.abc import Callable, Iterator, Sequence

import torch
from lens_kernels import interference_scores, token_logprobs
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lens_megatron.policy.model import Policy, reference_weights
from lens_megatron.types import SequenceBatch

RowFunction = Callable[[Tensor, int], Tensor]
"""(logits [B, S, V/tp], index of the micro-batch) -> [B, S] float32."""

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its response."""


def make_sequences(pairs: Sequence[Pair], device: torch.device) -> SequenceBatch:
    """Right-pads prompt + response; targets are the response's tokens only."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.int64)
    target_ids = torch.full((len(pairs), length), -1, dtype=torch.int64)
    for row, (prompt, response) in enumerate(pairs):
        tokens = torch.tensor(prompt + response)
        input_ids[row, : len(tokens)] = tokens
        target_ids[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    return SequenceBatch(input_ids.to(device), target_ids.to(device))


def response_log_probs(policy: Policy, pairs: Sequence[Pair], *, rows: int, temperature: float) -> list[Tensor]:
    """log pi(response | prompt) under the weights now in the model, `rows` sequences per micro-batch.

    Returns, on every rank of the model-parallel group, one float32 CPU tensor per pair, [tokens of its response].
    """
    batches = [make_sequences(pairs[i : i + rows], policy.mesh.device) for i in range(0, len(pairs), rows)]
    results = run_forward(policy, batches, _log_probs_of(policy, batches, temperature))
    return [
        row[targets >= 0]
        for batch, values in zip(batches, results, strict=True)
        for row, targets in zip(values, batch.target_ids.cpu(), strict=True)
    ]


def prompt_scores(policy: Policy, prompts: Sequence[tuple[int, ...]], *, rows: int) -> list[Tensor]:
    """Interference score |log pi_theta - log pi_ref| of every prompt token given its prefix (LENS, eq. 1).

    Both passes use the same code, batches and float32 log-softmax, so that equal weights give exactly 0.
    Returns one float32 CPU tensor per prompt, [tokens], 0 at position 0, on every rank of the model-parallel group.
    """
    pairs = [(prompt[:1], prompt[1:]) for prompt in prompts]
    batches = [make_sequences(pairs[i : i + rows], policy.mesh.device) for i in range(0, len(pairs), rows)]
    with reference_weights(policy):
        reference = run_forward(policy, batches, _log_probs_of(policy, batches, temperature=1.0))

    def score(logits: Tensor, index: int) -> Tensor:
        return interference_scores(
            logits,
            batches[index].target_ids,
            reference_logprobs=reference[index].to(logits.device),
            valid_vocab_size=policy.vocab_size,
            tp_group=policy.mesh.tp_group,
        )

    results = run_forward(policy, batches, score)
    rows_of_scores = [row for values in results for row in values]
    return [
        torch.cat([torch.zeros(1), row[: len(prompt) - 1]]) for row, prompt in zip(rows_of_scores, prompts, strict=True)
    ]


def run_forward(policy: Policy, batches: Sequence[SequenceBatch], row_function: RowFunction) -> list[Tensor]:
    """Runs all micro-batches through the pipeline and `row_function` on the last stage.

    Returns its results on the CPU of every rank of the model-parallel group, one [B, S] tensor per micro-batch.
    """
    if not batches:
        return []
    for chunk in policy.chunks:
        chunk.eval()

    def forward_step(iterator: Iterator[tuple[int, SequenceBatch]], model: torch.nn.Module, *_: object):
        index, batch = next(iterator)
        return model_output(model, batch), lambda logits, non_loss_data: row_function(logits, index)

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(enumerate(batches)) for _ in policy.chunks],
            model=policy.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].input_ids.shape[1],
            micro_batch_size=batches[0].input_ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return _to_every_stage(policy, results, batches)


def model_output(model: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """[B, S, V/tp] logits on the last stage, hidden states elsewhere.

    No attention mask: attention is causal and padding stands on the right, where no real token looks.
    """
    sequences, length = batch.input_ids.shape
    positions = torch.arange(length, device=batch.input_ids.device).expand(sequences, length)
    return model(input_ids=batch.input_ids, position_ids=positions, attention_mask=None)


def _log_probs_of(policy: Policy, batches: Sequence[SequenceBatch], temperature: float) -> RowFunction:
    def log_probs(logits: Tensor, index: int) -> Tensor:
        return token_logprobs(
            logits,
            batches[index].target_ids,
            temperature=temperature,
            valid_vocab_size=policy.vocab_size,
            tp_group=policy.mesh.tp_group,
        )

    return log_probs


def _to_every_stage(policy: Policy, results: list[Tensor], batches: Sequence[SequenceBatch]) -> list[Tensor]:
    mesh = policy.mesh
    if mesh.pp_size == 1:
        return [result.cpu() for result in results]
    shapes = [batch.input_ids.shape for batch in batches]
    flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=torch.float32, device=mesh.device)
    if mesh.is_last_stage:
        flat = torch.cat([result.reshape(-1) for result in results])
    torch.distributed.broadcast(flat, src=mesh.last_stage_rank, group=mesh.pp_group)
    parts = flat.cpu().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
