"""Does the same update by transformers and PyTorch alone, and with Liger-Kernel: padded batches, AdamW, no Megatron."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from lens_megatron.config import Config
from lens_megatron.types import Sample

Batch = list[Sample]


def batches_in_order(samples: Sequence[Sample], budget: int) -> list[Batch]:
    """Batches a fixed number of neighbours, as many as fit into `budget` tokens when all are as long as the longest."""
    count = max(1, budget // max(map(_length, samples)))
    return [list(samples[i : i + count]) for i in range(0, len(samples), count)]


def batches_by_length(samples: Sequence[Sample], budget: int) -> list[Batch]:
    """Batches, longest first, as many as fit into `budget` tokens with their padding: the best that padding can do."""
    made: list[Batch] = []
    for sample in sorted(samples, key=_length, reverse=True):
        if not made or (len(made[-1]) + 1) * _length(made[-1][0]) > budget:
            made.append([])
        made[-1].append(sample)
    return made


CUTS = {"in order": batches_in_order, "by length": batches_by_length}


class Peer:
    """A model, its frozen reference and AdamW; `step` does what `update.train_on` does."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, cut: str, liger: bool = False):
        self.config, self.device, self.cut, self.liger = config, device, CUTS[cut], liger
        self.model, self.reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device)
            for path in (config.model.path, config.model.reference_path)
        )
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_qwen2

            for model in (self.model, self.reference):
                apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False, model=model)
        ours = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=ours.lr,
            betas=(ours.adam_beta1, ours.adam_beta2),
            eps=ours.adam_eps,
            weight_decay=ours.weight_decay,
            fused=True,
        )
        self.seconds: dict[str, float] = {}
        self.padding_waste = 0.0

    def step(self, samples: Sequence[Sample]) -> tuple[float, float]:
        """Computes reference log-probabilities and does one update. Returns the loss and the norm of its gradient."""
        batches = self.cut(samples, self.config.train.max_tokens_per_micro_batch)
        rows = sum(len(batch) * max(map(_length, batch)) for batch in batches)
        self.padding_waste = 1 - sum(map(_length, samples)) / rows
        tokens = sum(len(s.rollout.token_ids) for s in samples)
        start = time.perf_counter()
        with torch.no_grad():
            reference = [self._log_probs(self.reference, batch) for batch in batches]
        self._finish()
        middle = time.perf_counter()
        loss = 0.0
        for batch, ref in zip(batches, reference, strict=True):
            part = (self._liger_loss if self.liger else self._loss)(batch, ref, tokens)
            part.backward()
            loss += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._finish()
        self.seconds = {"ref": middle - start, "update_actor": time.perf_counter() - middle}
        return loss, norm

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _hidden(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Returns [B, S, D]. No mask is needed: padding follows the tokens, where causal attention does not look."""
        longest = max(map(_length, batch))
        rows = [torch.tensor(s.prompt + s.rollout.token_ids) for s in batch]
        ids = torch.stack([pad(row, (0, longest - len(row))) for row in rows]).to(self.device)
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

    def _log_probs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Returns [T] float32 of the batch's response tokens, from logits of those rows alone."""
        hidden = self._hidden(model, batch)
        rows = torch.cat([hidden[i, len(s.prompt) - 1 : _length(s) - 1] for i, s in enumerate(batch)])
        targets = torch.tensor([t for s in batch for t in s.rollout.token_ids], device=self.device)
        logits = model.lm_head(rows).float() / self.config.rollout.temperature
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def _loss(self, batch: Batch, reference: Tensor, tokens: int) -> Tensor:
        """Computes GRPO's loss with k3, on-policy, token-mean over the whole step."""
        log_probs = self._log_probs(self.model, batch)
        algorithm = self.config.algorithm
        advantages = torch.cat([torch.full((len(s.rollout.token_ids),), s.advantage) for s in batch]).to(self.device)
        ratio = (log_probs - log_probs.detach()).exp()
        bounded = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        surrogate = torch.maximum(-ratio * advantages, -bounded * advantages)
        shift = reference - log_probs
        return (surrogate + algorithm.kl_coef * (shift.exp() - shift - 1)).sum() / tokens

    def _liger_loss(self, batch: Batch, reference: Tensor, tokens: int) -> Tensor:
        """Computes the same by Liger's fused loss, whose `bnpo` divides by the batch's own response tokens."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        algorithm = self.config.algorithm
        fused = LigerFusedLinearGRPOLoss(
            beta=algorithm.kl_coef,
            epsilon_low=algorithm.clip_low,
            epsilon_high=algorithm.clip_high,
            loss_type="bnpo",
            temperature=self.config.rollout.temperature,
        )
        hidden = self._hidden(self.model, batch)
        sizes = [len(s.rollout.token_ids) for s in batch]
        longest = max(sizes)
        starts = torch.tensor([len(s.prompt) - 1 for s in batch], device=self.device)
        rows = (starts[:, None] + torch.arange(longest, device=self.device)).clamp(max=hidden.shape[1] - 1)
        picked = hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))
        targets = torch.stack([pad(torch.tensor(s.rollout.token_ids), (0, longest - len(s.rollout.token_ids)))
                               for s in batch])  # fmt: skip
        mask = torch.stack([pad(torch.ones(n), (0, longest - n)) for n in sizes])
        ref = torch.stack([pad(part, (0, longest - len(part))) for part in reference.split(sizes)])
        advantages = torch.tensor([s.advantage for s in batch])
        loss, _ = fused(
            *(picked, self.model.lm_head.weight, targets.to(self.device), mask.to(self.device)),
            advantages.to(self.device),
            ref_per_token_logps=ref,
        )
        return loss * sum(sizes) / tokens


def _length(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.rollout.token_ids)
