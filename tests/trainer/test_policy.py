"""Megatron's policy beside transformers: same numbers in, same bytes out; and the chain trainer -> engine.

Tensor- and pipeline-parallel equality is in test_train.py, by whole runs.
"""

from pathlib import Path

import pytest
import torch
from checkpoint_policy import SIZES
from chosen import objective
from records import rollout, training_rows
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lens_megatron.batch import pack
from lens_megatron.batch.pack import make_sequences
from lens_megatron.config import AlgorithmConfig, ConfigError, from_tree
from lens_megatron.data.model_files import ModelError
from lens_megatron.policy.export import export_weights
from lens_megatron.policy.forward import model_output, prompt_scores, response_log_probs
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.policy.model import Policy, build_policy, reference_weights
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.policy.parallel import Mesh
from lens_megatron.rollout.engine import Request, WeightManifestError
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.types import Sample

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def mixture(tied: bool, **options) -> Qwen3MoeForCausalLM:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, tie_word_embeddings=tied, **options))


FAMILIES = {
    "qwen2": lambda tied: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)),
    "qwen3": lambda tied: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=tied)),
    "qwen3_moe": lambda tied: mixture(tied, norm_topk_prob=True),
    "qwen3_moe_with_a_dense_layer": lambda tied: mixture(tied, norm_topk_prob=False, mlp_only_layers=[1]),
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=tied)),
    "llama_linear_rope": lambda tied: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            tie_word_embeddings=tied,
        )
    ),
}
PAIRS = [((1, 5, 9), (3, 7)), ((2, 8, 100), (4, 5, 6, 7, 9, 11)), ((2, 8, 100, 17, 8), (129,))]


def tree(path: str, **sections: dict) -> dict:
    return {
        "run": {"directory": "unused"},
        "model": {"path": path},
        "data": {"train": "unused"},
        "rollout": {"max_response_length": 8},
        **sections,
    }


def saved_model(family: str, tied: bool, folder: Path, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = FAMILIES[family](tied).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5
    model.save_pretrained(folder)
    return model


def policy_of(folder: Path, mesh: Mesh, **sections: dict) -> Policy:
    return build_policy(from_tree(tree(str(folder), **sections)), mesh)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_and_export_equals_import(family: str, tied: bool, mesh: Mesh, tmp_path: Path):
    model = saved_model(family, tied, tmp_path)
    policy = policy_of(tmp_path, mesh)
    batch = make_sequences([(tuple(range(3, 60)), tuple(range(60, 90)))], mesh.device)
    (network,) = policy.models()
    with torch.no_grad():
        hidden = model_output(policy, network, batch)
        logits = hidden.transpose(0, 1) @ network.head_weight().T
        expected = model(batch.input_ids).logits
    assert hidden.shape == (87, 1, 64)
    assert (logits - expected).abs().max() < 1e-4
    exported, original = dict(export_weights(policy)), load_file(tmp_path / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_response_log_probs_whatever_the_micro_batches(mesh: Mesh, tmp_path: Path):
    model = saved_model("qwen3", True, tmp_path)
    policy = policy_of(tmp_path, mesh)
    for max_tokens in (1, 24, 1000):
        found = response_log_probs(policy, PAIRS, max_tokens=max_tokens, temperature=0.7)
        for (prompt, response), values in zip(PAIRS, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            assert (values - expected).abs().max() < 1e-5


def test_gradient_of_an_update_is_autograds_on_transformers(mesh: Mesh, tmp_path: Path):
    # On-policy rows: the gradient is that of - sum of w~ A / tokens * log p. Three samples in two micro-batches.
    model = saved_model("qwen3", True, tmp_path)
    policy = policy_of(tmp_path, mesh, algorithm={"kl_coef": 0.0}, optimizer={"lr": 1e-3})
    algorithm = from_tree(tree("x", algorithm={"kl_coef": 0.0})).algorithm
    weighted = [(1.5, 0.25), (-0.5, 0.75), (2.0, 1.0)]
    rows = [
        Sample(prompt, prompt, rollout(True, tokens=response), advantage, weight)
        for (prompt, response), (advantage, weight) in zip(PAIRS, weighted, strict=True)
    ]
    scale = pack.count(rows)
    batches = pack.pack(
        training_rows(rows),
        scale=scale,
        algorithm=algorithm,
        max_response_length=8,
        parts=[[0, 1], [2]],
        device=mesh.device,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stats = optimizer_step(policy, batches, scale, objective(algorithm), algorithm, temperature=1.0)
    loss = torch.zeros(())
    for (prompt, response), (advantage, weight) in zip(PAIRS, weighted, strict=True):
        log_probs = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        loss = loss - advantage * weight / 9 * log_probs.gather(1, torch.tensor(response)[:, None]).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert scale.response_tokens == 9 and stats.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert stats.ratio_min == stats.ratio_max == 1.0 and not stats.skipped and policy.version == 1
    moved = dict(export_weights(policy))
    for name, parameter in model.named_parameters():  # Adam's first step is lr * sign(gradient)
        clear = parameter.grad.abs() > 1e-4
        step = (moved[name] - before[name])[clear]
        assert torch.equal(step.sign(), -parameter.grad[clear].sign()), name


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, views included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *(x.numel() for x in tensors), 0)
        return result


@pytest.mark.parametrize(
    "options",
    [{"kl_coef": 0.1}, {"imitation_coef": 0.1}, {"ratio": "sequence"}],
    ids=["fused", "objective", "two phases"],
)
def test_no_pass_holds_all_logits_and_unmoved_weights_give_ratio_1(options: dict, mesh: Mesh, tmp_path: Path):
    # 20 responses of 30 tokens: 600 rows of 1031 columns, of which the head holds a chunk at a time.
    columns, logits = 1031, 600 * 1031
    config = Qwen3Config(**{**SIZES, "vocab_size": columns, "hidden_size": 32}, head_dim=16)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    policy, algorithm = policy_of(tmp_path, mesh, algorithm=options), AlgorithmConfig(**options)
    pairs = [((1, 2, i), tuple(range(30))) for i in range(20)]
    rows = [Sample(prompt, prompt, rollout(True, tokens=tokens), 1.0, 1.0) for prompt, tokens in pairs]
    with LargestTensor() as forward:
        old = response_log_probs(policy, pairs, max_tokens=1000, temperature=0.7)
        prompt_scores(policy, [prompt + tokens for prompt, tokens in pairs], max_tokens=1000)
    batches = pack.pack(
        training_rows(rows, old, old),
        scale=pack.count(rows),
        algorithm=algorithm,
        max_response_length=30,
        parts=[range(20)],
        device=mesh.device,
    )
    with LargestTensor() as backward:
        stats = optimizer_step(policy, batches, pack.count(rows), objective(algorithm), algorithm, temperature=0.7)
    assert stats.ratio_min == stats.ratio_max == 1.0 and stats.kl == 0.0 and stats.grad_norm > 0
    assert forward.elements < logits / 2 and backward.elements < logits / 2
    with LargestTensor() as plain:
        (network,) = policy.models()
        network.output_layer(model_output(policy, network, batches[0].sequences), weight=network.head_weight())
    assert plain.elements > logits, "the meter does not see logits"


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_scores_are_exactly_0_at_equal_weights_and_the_log_ratio_else(family: str, mesh: Mesh, tmp_path: Path):
    policy_model, reference = (
        saved_model(family, False, tmp_path / "a"),
        saved_model(family, False, tmp_path / "b", seed=1),
    )
    prompts = [(1, 5, 9, 3, 7), (2, 8, 100)]
    same = prompt_scores(policy_of(tmp_path / "a", mesh), prompts, max_tokens=24)
    assert all(not scores.any() for scores in same)
    sections = {"model": {"path": str(tmp_path / "a"), "reference_path": str(tmp_path / "b")}}
    policy = policy_of(tmp_path / "a", mesh, **sections)
    for prompt, scores in zip(prompts, prompt_scores(policy, prompts, max_tokens=24), strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            a, b = (m(ids).logits[0, :-1].log_softmax(-1) for m in (policy_model, reference))
        expected = (a - b).gather(1, ids[0, 1:, None])[:, 0].abs()
        assert scores[0] == 0 and (scores[1:] - expected).abs().max() < 1e-5
    before = dict(export_weights(policy))
    with reference_weights(policy):
        within = {name: tensor.clone() for name, tensor in export_weights(policy)}
    for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
        assert torch.equal(within[name], tensor), name
    after = dict(export_weights(policy))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_engine_log_probs_are_the_trainers_after_a_sync(family: str, mesh: Mesh, tmp_path: Path):
    saved_model(family, True, tmp_path / "a")
    saved_model(family, True, tmp_path / "b", seed=1)
    add_tokenizer(tmp_path / "a")
    engine = LocalEngine(str(tmp_path / "a"), max_running_sequences=3)
    outputs = []
    for version, name in enumerate("ab"):
        policy = policy_of(tmp_path / name, mesh)
        engine.load_weights(export_weights(policy), version)
        engine.submit(Request(i, prompt, 8, 0.8, seed=i) for i, (prompt, _) in enumerate(PAIRS * 2))
        completions = sorted(drain(engine), key=lambda c: c.request_id)
        pairs = [(PAIRS[c.request_id % 3][0], c.token_ids) for c in completions]
        for completion, expected in zip(
            completions, response_log_probs(policy, pairs, max_tokens=64, temperature=0.8), strict=True
        ):
            assert (torch.tensor(completion.log_probs) - expected).abs().max() < 1e-4
            assert completion.weight_version == version
        outputs.append([c.token_ids for c in completions])
    assert outputs[0] != outputs[1]


def drain(engine: LocalEngine) -> list:
    completions = []
    while engine.progress().waiting or engine.progress().running:
        completions += engine.step()
    return completions


def add_tokenizer(folder: Path) -> None:
    from lens_megatron.tools.demo.problems import stream
    from lens_megatron.tools.demo.tokenizer import train_tokenizer

    lines = [next(stream("train", seed, {0: 1})).problem for seed in range(50)]
    train_tokenizer(lines).save_pretrained(folder)


def test_engine_samples_alone_as_in_a_crowd_and_refuses_bad_manifests(mesh: Mesh, tmp_path: Path):
    model = saved_model("qwen3", True, tmp_path)
    add_tokenizer(tmp_path)
    engine = LocalEngine(str(tmp_path), max_running_sequences=2)
    weights = [(n, p.data) for n, p in model.named_parameters()]
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.submit([Request(0, (1,), 1, 1.0, 0)])
    engine.load_weights(weights, 0)
    engine.submit([Request(0, (5, 6, 7), 8, 1.0, seed=3)])
    (alone,) = drain(engine)
    engine.submit(
        [Request(i, (9,) * (i + 1), 8, 1.0, seed=9) for i in range(1, 4)] + [Request(0, (5, 6, 7), 8, 1.0, 3)]
    )
    crowd = {c.request_id: c for c in drain(engine)}
    assert crowd[0].token_ids == alone.token_ids
    engine.submit([Request(7, (5, 6, 7), 4, 0.0, seed=0)])
    (greedy,) = drain(engine)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert list(greedy.token_ids) == expected.tolist()
    bad = {
        "missing model.norm.weight": [w for w in weights if w[0] != "model.norm.weight"],
        "unknown extra.weight": [*weights, ("extra.weight", torch.zeros(1))],
        "duplicate model.norm.weight": [*weights, ("model.norm.weight", model.model.norm.weight)],
        r"model.norm.weight has shape \(3,\)": [
            (n, torch.zeros(3) if n == "model.norm.weight" else p) for n, p in weights
        ],
    }
    for message, stream in bad.items():
        with pytest.raises(WeightManifestError, match=message):
            engine.load_weights(stream, 1)
        with pytest.raises(RuntimeError, match="load_weights first"):
            engine.submit([Request(0, (1,), 1, 1.0, 0)])


def test_collect_follows_the_softmax(mesh: Mesh, tmp_path: Path):
    model = saved_model("qwen2", True, tmp_path)
    add_tokenizer(tmp_path)
    engine = LocalEngine(str(tmp_path), max_running_sequences=500)
    engine.load_weights([(n, p.data) for n, p in model.named_parameters()], 0)
    engine.submit(Request(i, (5, 6, 7), 1, 1.5, seed=i) for i in range(4000))
    counts = torch.zeros(131)
    for completion in drain(engine):
        counts[completion.token_ids[0]] += 1
    with torch.no_grad():
        p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.5).softmax(-1)
    likely = p * 4000 >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * 4000
    chi_square = ((observed - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_model_directories_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ModelError, match="no config.json"):
        read_hf_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="model type 'gpt2'; supported: llama, qwen2, qwen3"):
        read_hf_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match="cannot be read"):
        read_hf_config(str(tmp_path))
    # huggingface_hub's validation raises a class of its own, which is no ValueError.
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match="cannot be read: .*hidden_size"):
        read_hf_config(str(tmp_path))
    saved_model("qwen3", True, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no \\*.safetensors"):
        read_hf_config(str(tmp_path))


def test_layouts_and_lengths_the_model_does_not_allow(mesh: Mesh, tmp_path: Path):
    saved_model("qwen3", True, tmp_path)
    for options, message in (
        ({"tensor_model_parallel_size": 3}, r"tensor_model_parallel_size \(3\) does not divide .* \(4\)"),
        ({"pipeline_model_parallel_size": 4}, r"pipeline_model_parallel_size \(4\) does not divide .* \(2\)"),
        ({"transformer": {"no_such_option": 1}}, "megatron.transformer: .*no_such_option"),
        ({"ddp": {"overlap_param_gather": True}}, "megatron.ddp.overlap_param_gather"),
        ({"optimizer": {"no_such_option": 1}}, "megatron.optimizer: .*no_such_option"),
        ({"optimizer": {"optimizer": "best"}}, "megatron.optimizer: .*best"),
    ):
        with pytest.raises(ConfigError, match=message):
            policy_of(tmp_path, mesh, megatron=options)
    with pytest.raises(ConfigError, match="20512 exceeds the model's max_position_embeddings"):
        policy_of(tmp_path, mesh, rollout={"max_response_length": 20000})
