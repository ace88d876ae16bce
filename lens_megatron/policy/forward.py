"""Forward passes without gradients: log-probabilities of given tokens, over all micro-batches in one pipelined run."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn.functional import pad

from lens_megatron.pack import Pair, make_sequences
from lens_megatron.policy.head import token_log_probs
from lens_megatron.policy.model import Policy, reference_weights
from lens_megatron.types import SequenceBatch


def response_log_probs(policy: Policy, pairs: Sequence[Pair], *, rows: int, temperature: float) -> list[Tensor]:
    """log pi(response | prompt) under the weights now in the model, `rows` sequences per micro-batch.

    Returns, on every rank of the model-parallel group, one float32 CPU tensor per pair, [tokens of its response].
    """
    return _run(policy, _cut(policy, pairs, rows), temperature)


def prompt_scores(policy: Policy, prompts: Sequence[tuple[int, ...]], *, rows: int) -> list[Tensor]:
    """Interference score |log pi_theta - log pi_ref| of every prompt token given its prefix (LENS, eq. 1).

    Both passes use the same code, batches and un-rounded float32 logits, so that equal weights give exactly 0.
    Returns one float32 CPU tensor per prompt, [tokens], 0 at position 0, on every rank of the model-parallel group.
    """
    batches = _cut(policy, [(prompt[:1], prompt[1:]) for prompt in prompts], rows)
    with reference_weights(policy):
        reference = _run(policy, batches, temperature=1.0)
    current = _run(policy, batches, temperature=1.0)
    return [torch.cat([torch.zeros(1), (a - b).abs()]) for a, b in zip(current, reference, strict=True)]


def model_output(model: torch.nn.Module, batch: SequenceBatch) -> Tensor:
    """[S, B, D] hidden states, on the last stage after the final norm; [S/tp, B, D] under sequence parallelism.

    No attention mask: attention is causal and padding stands on the right, where no real token looks.
    """
    input_ids, config = batch.input_ids, model.config
    if config.sequence_parallel:
        input_ids = pad(input_ids, (0, -input_ids.shape[1] % config.tensor_model_parallel_size))
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    return model(input_ids=input_ids, position_ids=positions, attention_mask=None)


def _cut(policy: Policy, pairs: Sequence[Pair], rows: int) -> list[SequenceBatch]:
    return [make_sequences(pairs[i : i + rows], policy.mesh.device) for i in range(0, len(pairs), rows)]


def _run(policy: Policy, batches: Sequence[SequenceBatch], temperature: float) -> list[Tensor]:
    """Log-probabilities of every sequence's targets, on the CPU of every rank of the model-parallel group."""
    if not batches:
        return []
    for chunk in policy.chunks:
        chunk.eval()

    def forward_step(iterator: Iterator[SequenceBatch], model: torch.nn.Module, *_: object):
        batch = next(iterator)
        return model_output(model, batch), lambda hidden, non_loss_data: token_log_probs(
            policy, hidden, batch, temperature
        )

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in policy.chunks],
            model=policy.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].input_ids.shape[1],
            micro_batch_size=batches[0].input_ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    lengths = [length for batch in batches for length in batch.lengths]
    return list(_to_every_stage(policy, results, sum(lengths)).cpu().split(lengths))


def _to_every_stage(policy: Policy, results: list[Tensor], count: int) -> Tensor:
    """The last stage's results in one [count] float32 tensor, on every stage."""
    mesh = policy.mesh
    if mesh.is_last_stage:
        flat = torch.cat(results)
    else:
        flat = torch.empty(count, dtype=torch.float32, device=mesh.device)
    if mesh.pp_size > 1 and count:
        torch.distributed.broadcast(flat, src=mesh.last_stage_rank, group=mesh.pp_group)
    return flat
