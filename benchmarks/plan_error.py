"""Compares the memory model of `lens_megatron.plan` with what Megatron-Core allocates, on small models, on a CPU.

    python benchmarks/plan_error.py --out benchmarks/results/plan_error_cpu_202611.json

Every case starts its ranks, builds the policy as training does, does two updates, and counts bytes: of weights,
gradients and optimizer by their storages; of one micro-batch by watching every tensor that any operator makes, from its
making to its freeing, through forward and backward. The worst rank is compared with the prediction for it.

The layers are those of the local spec, the head is lens_kernels' linear operators; on a CPU neither Transformer Engine
nor flash attention nor an engine runs. The model of layers was written from their operators. The first cases have since
led to one correction (how many rows reach the head of a context-parallel rank); older coefficients of temporaries were
fitted on models of the same shapes. `held_out` is a shape of its own, which was run once, afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 64
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
MODELS = {
    "qwen2": ("Qwen2", dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=8, num_key_value_heads=2,
              intermediate_size=1024, vocab_size=8192, tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(num_hidden_layers=6, hidden_size=320, num_attention_heads=8, num_key_value_heads=4,
              head_dim=64, intermediate_size=1280, vocab_size=12288, tie_word_embeddings=True)),
    "llama": ("Llama", dict(num_hidden_layers=8, hidden_size=384, num_attention_heads=6, num_key_value_heads=6,
              intermediate_size=1024, vocab_size=8192, tie_word_embeddings=False)),
    "small_head": ("Qwen2", dict(num_hidden_layers=6, hidden_size=256, num_attention_heads=8, num_key_value_heads=2,
                   intermediate_size=1024, vocab_size=512, tie_word_embeddings=False)),
    "held_out": ("Qwen3", dict(num_hidden_layers=5, hidden_size=448, num_attention_heads=14, num_key_value_heads=2,
                 head_dim=48, intermediate_size=1184, vocab_size=5000, tie_word_embeddings=False)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    dtype: str = "bfloat16"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    vp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"
    sequences: int = 1
    length: int = 384
    micro_batches: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp * self.cp


CASES = (
    *(Case(f"qwen2/bfloat16/{recompute}", "qwen2", recompute=recompute) for recompute in ("none", "selective", "full")),
    Case("qwen3/bfloat16/none", "qwen3"),
    Case("qwen3/float32/selective", "qwen3", "float32", recompute="selective"),
    Case("llama/bfloat16/4x192", "llama", sequences=4, length=192),
    Case("small_head/bfloat16/1x768", "small_head", length=768),
    Case("qwen2/bfloat16/dp2", "qwen2", dp=2, distributed_optimizer=True),
    Case("llama/bfloat16/tp2sp", "llama", tp=2, sequence_parallel=True),
    Case("qwen3/bfloat16/cp2", "qwen3", cp=2, distributed_optimizer=True),
    Case("llama/bfloat16/pp2", "llama", pp=2, micro_batches=4),
    Case("llama/bfloat16/pp2vp2", "llama", pp=2, vp=2, micro_batches=4),
    Case("held_out/bfloat16/2x448/selective", "held_out", recompute="selective", sequences=2, length=448),
    Case("held_out/float32/3x300", "held_out", "float32", sequences=3, length=300),
    Case("held_out/bfloat16/tp2sp/full", "held_out", tp=2, sequence_parallel=True, recompute="full", length=448),
    Case("held_out/bfloat16/cp2/2x448", "held_out", cp=2, sequences=2, length=448),
)


# ---- measuring ----------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they are freed; `peak` is the highest sum."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.seen: set[int] = set()
        self.live = self.peak = 0
        for tensor in known:
            self._meet(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self._born(tensor.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        """Notes a storage that was there before; when it is gone, another may be made at its address."""
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            weakref.finalize(storage, self.seen.discard, storage._cdata)

    def _born(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._died, size, key)

    def _died(self, size: int, key: int) -> None:
        self.seen.discard(key)
        self.live -= size


class SavedBytes:
    """Counts the storages that autograd keeps for the backward pass; `peak` is the highest sum."""

    def __init__(self, known: Iterable[Tensor]):
        self.known = {t.untyped_storage()._cdata for t in known}
        self.held: dict[int, int] = {}
        self.live = self.peak = 0

    @contextmanager
    def watching(self):
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor):
            yield self

    def _pack(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        box = _Box(tensor.detach() if tensor.is_leaf else tensor)
        if key not in self.known:
            if not self.held.get(key):
                self.live += size
                self.peak = max(self.peak, self.live)
            self.held[key] = self.held.get(key, 0) + 1
            weakref.finalize(box, self._release, key, size)
        return box

    def _release(self, key: int, size: int) -> None:
        self.held[key] -= 1
        if not self.held[key]:
            self.live -= size


class _Box:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def config_tree(case: Case, folder: Path) -> dict:
    return {
        "run": {"directory": str(folder / "run")},
        "model": {"path": str(folder / "model"), "dtype": case.dtype},
        "data": {"train": "unused", "max_prompt_length": PROMPT},
        "rollout": {"max_response_length": case.length - PROMPT, "rollouts_per_prompt": case.sequences,
                    "prompts_per_step": case.dp * case.micro_batches},
        "train": {"max_tokens_per_micro_batch": case.sequences * case.length},
        "megatron": {
            "tensor_model_parallel_size": case.tp,
            "pipeline_model_parallel_size": case.pp,
            "virtual_pipeline_model_parallel_size": case.vp,
            "context_parallel_size": case.cp,
            "sequence_parallel": case.sequence_parallel,
            "use_distributed_optimizer": case.distributed_optimizer,
            "transformer": {"none": {}, "full": FULL, "selective": SELECTIVE}[case.recompute],
        },
    }  # fmt: skip


def measure(case: Case, folder: Path) -> dict:
    """Measures bytes on this rank. Runs under torchrun, or alone for one rank."""
    from megatron.core import parallel_state

    from lens_megatron.algorithms.objectives import OBJECTIVES
    from lens_megatron.batch import pack
    from lens_megatron.config import from_tree
    from lens_megatron.policy import platform
    from lens_megatron.policy.forward import response_log_probs
    from lens_megatron.policy.model import build_policy
    from lens_megatron.policy.optimizer_step import optimizer_step
    from lens_megatron.policy.parallel import build_mesh
    from lens_megatron.types import LossScale, TrainingRow

    device = platform.install()
    platform.init_process_group(device)
    config = from_tree(config_tree(case, folder))
    mesh = build_mesh(config.megatron, 0, device)
    policy = build_policy(config, mesh)
    vocabulary = policy.vocab_size
    torch.manual_seed(0)  # context-parallel ranks work on the same samples
    ids = torch.randint(1, vocabulary, (case.sequences * case.micro_batches, case.length)).tolist()
    samples = [_sample(tuple(row), prompt=PROMPT) for row in ids]
    count = pack.count(samples)
    scale = LossScale(count.response_tokens * case.dp, count.sequences * case.dp, 0)
    batches = pack.pack(
        [TrainingRow(sample, None, None, torch.zeros(case.length - PROMPT)) for sample in samples],
        scale=scale, algorithm=config.algorithm, max_response_length=case.length - PROMPT,
        parts=[range(i, i + case.sequences) for i in range(0, len(samples), case.sequences)], device=device,
        layout=policy.layout,
    )  # fmt: skip

    def one_update() -> None:
        optimizer_step(policy, batches, scale, OBJECTIVES["token"], config.algorithm, 1.0)

    one_update()
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    gradients = [b.grad_data for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = list(_optimizer_tensors(policy.optimizer))
    own = {t.untyped_storage()._cdata for t in (*parameters, *gradients)}
    known = [*parameters, *gradients, *state]
    saved = SavedBytes(known)
    with saved.watching():
        one_update()
    with LiveBytes(known) as live:
        policy.optimizer.step = lambda: None  # its own temporaries come after the backward pass
        one_update()
    buffer = storage_bytes(parallel_state.get_global_memory_buffer().buffer.values())
    pairs = [(s.prompt, s.rollout.token_ids) for s in samples]
    with LiveBytes(known) as scoring:
        response_log_probs(policy, pairs, max_tokens=case.sequences * case.length, temperature=1.0)
    return {
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes(gradients),
        "optimizer": storage_bytes(t for t in state if t.untyped_storage()._cdata not in own),
        "saved": saved.peak,
        "update_peak": live.peak + buffer,
        "scoring_peak": scoring.peak + buffer,
    }


def _sample(ids: tuple[int, ...], prompt: int):
    from lens_megatron.types import Origin, Rollout, Sample

    values = {name: None for name in Rollout.__dataclass_fields__}
    values |= {"token_ids": ids[prompt:], "log_probs": (-1.0,) * len(ids[prompt:]), "origin": Origin.NATIVE}
    return Sample(ids[:prompt], ids[:prompt], Rollout(**values), 1.0, 1.0)


def _optimizer_tensors(optimizer) -> Iterable[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


# ---- predicting and comparing -------------------------------------------------------------------------------------


def predict(case: Case, folder: Path, stage: int) -> dict:
    from lens_megatron.config import from_tree
    from lens_megatron.tools.planning import memory
    from lens_megatron.tools.planning.activations import Packed
    from lens_megatron.tools.planning.layout import LayerSpec, layout_of
    from lens_megatron.tools.planning.model_shape import read_shape

    config = from_tree(config_tree(case, folder))
    layout, shape = layout_of(config, case.ranks, LayerSpec.LOCAL_CPU), read_shape(config.model.path)
    state = memory.state_bytes(shape, layout, stage)
    rows = case.sequences * (case.length - PROMPT)
    packed = Packed(case.sequences * case.length, case.length)
    update = memory.update_peaks(shape, layout, packed, rows, case.micro_batches, stage)
    forward = memory.forward_peaks(shape, layout, packed, rows, stage)
    return {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "saved": update.saved,
        "update_peak": update.activations + update.head,
        "scoring_peak": forward.activations + forward.head,
    }


def save_model(case: Case, folder: Path) -> int:
    import transformers

    family, sizes = MODELS[case.model]
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=4096)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder / "model")
    return sum(p.numel() for p in model.parameters())


def run_case(case: Case) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_model(case, folder)
        (folder / "case.json").write_text(json.dumps(asdict(case)))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, *launcher, __file__, "--worker", name],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        rows = []
        for rank in range(case.ranks):
            measured = json.loads((folder / f"rank_{rank}.json").read_text())
            predicted = predict(case, folder, stage := rank // (case.tp * case.cp * case.dp))
            rows.append({"rank": rank, "stage": stage, "measured": measured, "predicted": predicted})
    return {"case": asdict(case), "parameters": parameters, **worst_rank(rows)}


def worst_rank(rows: list[dict]) -> dict:
    """Returns the rank that needs most in the update, and the error there in percent of what was measured."""
    row = max(rows, key=lambda r: sum(r["measured"][k] for k in ("weights", "gradients", "optimizer", "update_peak")))
    errors = {
        key: round(100 * (row["predicted"][key] / value - 1), 2) if value else None
        for key, value in row["measured"].items()
    }
    total = {
        side: sum(row[side][k] for k in ("weights", "gradients", "optimizer", "update_peak"))
        for side in ("measured", "predicted")
    }
    errors["update_total"] = round(100 * (total["predicted"] / total["measured"] - 1), 2)
    return row | {"error_percent": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        case = Case(**json.loads((arguments.worker / "case.json").read_text()))
        found = measure(case, arguments.worker)
        (arguments.worker / f"rank_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
        return
    results = []
    for case in tqdm([c for c in CASES if arguments.only in c.name], unit=" cases"):
        try:
            results.append(run_case(case))
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{case.name} failed:\n{error.stderr.decode()[-3000:]}") from error
        row = results[-1]
        tqdm.write(f"{case.name:34}" + "".join(
            f" {key} {error:+.2f} %;" for key, error in row["error_percent"].items() if error is not None
        ))  # fmt: skip
    worst = {
        key: max((abs(r["error_percent"][key]), r["case"]["name"]) for r in results if r["error_percent"][key])
        for key in results[0]["error_percent"]
        if any(r["error_percent"][key] for r in results)
    }
    for key, (error, name) in worst.items():
        print(f"largest error of {key}: {error:.2f} % ({name})")
    if arguments.out:
        from lens_megatron.output.run_folder import environment

        document = {"environment": environment(), "largest_error_percent": worst, "cases": results}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
