"""Computes how strongly the answer's likelihood depends on every token of a prompt, and changes nothing in the policy.

One forward and one backward pass run over the packed micro-batches. The embeddings of the first stage are the only
tensors that get a gradient: the parameters are frozen meanwhile, so that neither their gradients nor the hooks of data
parallelism take part, and what Megatron does with gradients at the end of an update is left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from lens_megatron.batch.pack import Pair
from lens_megatron.policy.forward import model_output, pack_pairs, run_pipeline
from lens_megatron.policy.head import token_log_probs
from lens_megatron.policy.model import HiddenStatesModel, Policy, named_parameters
from lens_megatron.types import SequenceBatch


def prompt_gradients(policy: Policy, pairs: Sequence[Pair], *, max_tokens: int) -> list[Tensor]:
    """Computes || d NLL / d embedding(x_j) ||_2 for every prompt token x_j, where NLL = -log pi(answer | prompt).

    The weights are those now in the model, and the temperature is 1. With tied embeddings only the input's embedding
    counts, not the head's use of the same weight. A collective over all ranks, of which each gives the pairs of its
    data-parallel rank. Parameters, their gradients and the optimizer are the same to the bit afterwards, also after an
    exception.

    Args:
        pairs: token ids of each prompt and of its answer.
        max_tokens: the tokens of a micro-batch; a longer pair goes alone.

    Returns, on every rank of the model-parallel group, one float32 CPU tensor per pair, [tokens of its prompt], in nats
    per unit of the embedding. Source: LENS, arXiv 2601.21244, appendix E.
    """
    parts, batches = pack_pairs(policy, pairs, max_tokens, policy.layout_of_whole_sequences)
    if not parts:
        return []
    with _frozen(policy):
        norms = _backward_to_embeddings(policy, batches)
    flat = _on_every_rank(policy, norms, batches).cpu()
    found: dict[int, Tensor] = {}
    for part, batch, norm in zip(parts, batches, flat.split([b.bounds[-1] for b in batches]), strict=True):
        for i, start in zip(part, batch.bounds, strict=False):  # the last bounds are the end, and padding
            found[i] = norm[start : start + len(pairs[i][0])].clone()
    return [found[i] for i in range(len(pairs))]


@contextmanager
def _frozen(policy: Policy) -> Iterator[None]:
    """Within the block no parameter takes a gradient, and a backward pass ends without Megatron's work on gradients."""
    config = policy.bridge.config
    kept = config.finalize_model_grads_func, config.grad_scale_func
    trained = [parameter for _, parameter in named_parameters(policy.models()) if parameter.requires_grad]
    try:
        config.finalize_model_grads_func = config.grad_scale_func = None
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        config.finalize_model_grads_func, config.grad_scale_func = kept
        for parameter in trained:
            parameter.requires_grad_(True)


def _backward_to_embeddings(policy: Policy, batches: Sequence[SequenceBatch]) -> list[Tensor]:
    """Returns, per micro-batch on the first stage, the gradient's norm at each of this rank's rows, [S] float32, or
    [S/tp] under sequence parallelism; nothing on other stages."""
    norms: list[Tensor] = []
    for model in policy.models():
        model.eval()  # without routers' own losses
        model.decoder.training = True  # this flag alone lets the block recompute activations where that is configured

    def forward_step(
        iterator: Iterator[SequenceBatch], model: torch.nn.Module, *_: object
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        batch = next(iterator)
        network: HiddenStatesModel = unwrap_model(model)
        embedded = _watched_embeddings(network, batch, norms) if network.pre_process else None

        def loss_function(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss = -token_log_probs(policy, hidden, batch, temperature=1.0).sum()
            return loss, torch.tensor(1, dtype=torch.int), loss.detach()

        return model_output(policy, model, batch, embedded), loss_function

    run_pipeline(policy, forward_step, batches, batches[0].input_ids.shape[1], forward_only=False)
    return norms


def _watched_embeddings(network: HiddenStatesModel, batch: SequenceBatch, norms: list[Tensor]) -> Tensor:
    """Returns the embeddings of a micro-batch, [S, 1, D]; its backward pass puts the gradient's norms into `norms`."""
    with torch.no_grad():
        embedded = network.embedding(input_ids=batch.input_ids, position_ids=batch.position_ids)
    place = len(norms)
    norms.append(torch.zeros(len(embedded), device=embedded.device))

    def note(tensor: Tensor) -> None:
        if tensor.grad is not None:
            norms[place] = tensor.grad[:, 0].float().norm(dim=-1)
        tensor.grad = None  # the gradients of all micro-batches would take much more memory than their norms

    leaf = embedded.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(note)
    return leaf


def _on_every_rank(policy: Policy, norms: list[Tensor], batches: Sequence[SequenceBatch]) -> Tensor:
    """Gets the first stage's norms, of all ranks that divide the rows, as one float32 tensor [rows of all batches].

    A row's place is that in its micro-batch before any cut, so `SequenceBatch.bounds` say where its sequence begins.
    """
    mesh = policy.mesh
    totals = [batch.bounds[-1] for batch in batches]
    flat = torch.zeros(sum(totals), dtype=torch.float32, device=mesh.device)
    if mesh.pp_rank == 0:
        for whole, norm, batch in zip(flat.split(totals), norms, batches, strict=True):
            whole[_own_rows(policy, batch)] = norm
        if policy.layout.sequence_parallel_size > 1:
            torch.distributed.all_reduce(flat, group=mesh.tp_group)
        if mesh.cp_size > 1:
            torch.distributed.all_reduce(flat, group=mesh.cp_group)
    if mesh.pp_size > 1:
        first = torch.distributed.get_global_rank(mesh.pp_group, 0)
        torch.distributed.broadcast(flat, src=first, group=mesh.pp_group)
    return flat


def _own_rows(policy: Policy, batch: SequenceBatch) -> Tensor:
    """Returns int64: the places, before any cut, of the rows whose embeddings this rank holds."""
    bounds = torch.tensor(batch.bounds, device=policy.mesh.device)
    starts = bounds[:-1].repeat_interleave(bounds.diff() // policy.mesh.cp_size)
    rows = starts + batch.position_ids[0]
    layout = policy.layout
    return rows.chunk(layout.sequence_parallel_size)[policy.mesh.tp_rank if layout.sequence_parallel_size > 1 else 0]
