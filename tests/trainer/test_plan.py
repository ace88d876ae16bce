"""The planner's numbers, worked by hand; what it refuses, and in which words."""

import dataclasses

import pytest
from safetensors.torch import load_file
from toy_runs import ROOT, launch

from lens_megatron import config as configuration
from lens_megatron.config import ConfigError, from_tree
from lens_megatron.tools import plan as program
from lens_megatron.tools.planning import memory
from lens_megatron.tools.planning.activations import Packed, micro_batch_bytes
from lens_megatron.tools.planning.engine_memory import VLLM_ASLEEP_BYTES, cache_bytes, cache_suffices
from lens_megatron.tools.planning.hardware import GIB, cluster_of
from lens_megatron.tools.planning.host_memory import EXPORT_SHARD_BYTES, host_bytes
from lens_megatron.tools.planning.layout import LayerSpec, layout_of, workload_of
from lens_megatron.tools.planning.model_shape import SHAPES, ModelShape, from_hf, read_shape
from lens_megatron.tools.planning.plan import Plan, checkpoint_bytes, make_plan
from lens_megatron.tools.planning.step_time import Assumptions, bubble, step_times, weight_sync

QWEN_7B = str(ROOT / "configs" / "a800x8" / "lens_qwen2.5-7b.yaml")
LOCAL = ["rollout.engine=local", "rollout.max_running_sequences=64", "train.max_tokens_per_micro_batch=4608"]
"""The local engine keeps its weights on the GPU while the trainer computes, so that less room is left for an update."""
TINY = ModelShape(
    "qwen2", num_hidden_layers=4, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    intermediate_size=16, vocab_size=101, tie_word_embeddings=False, max_position_embeddings=64, qkv_bias=True,
)  # fmt: skip


def config(**sections: dict):
    tree = {"run": {"directory": "r"}, "model": {"path": "Qwen2.5-7B", "dtype": "bfloat16"}, "data": {"train": "t"}}
    for name, options in sections.items():
        tree[name] = {**tree.get(name, {}), **options}
    return from_tree(tree)


def layout(spec: LayerSpec = LayerSpec.LOCAL_CPU, world: int = 1, transformer: dict | None = None, **megatron):
    return layout_of(config(megatron={"transformer": transformer or {}, **megatron}), world, spec)


def phase(plan: Plan, name: str) -> memory.PhaseBytes:
    return next(phase for phase in plan.phases if phase.phase == name)


def refused(capsys, *arguments: str) -> str:
    assert program.main([*arguments]) == 2
    return capsys.readouterr().err


# ---- shapes -------------------------------------------------------------------------------------------------------


def test_parameters_of_a_tiny_model():
    # q 8x8, k and v 8x4 each, o 8x8: 192, biases 16; gate, up, down 3 x 8 x 16 = 384; two norms 16: 608 per layer.
    assert TINY.layer_parameters(tp=1) == 192 + 16 + 384 + 16
    # Four layers, embedding and head 101 x 8 each, final norm 8.
    assert TINY.parameters == 4 * 608 + 2 * 808 + 8
    # TP2: vocabulary padded to 102, norms whole. PP2: two layers; the first stage embeds, the last has norm and head.
    assert TINY.layer_parameters(tp=2) == (192 + 16 + 384) // 2 + 16
    assert TINY.stage_parameters(tp=2, pp=2, stage=0) == 2 * 312 + 51 * 8
    assert TINY.stage_parameters(tp=2, pp=2, stage=1) == 2 * 312 + 51 * 8 + 8
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    assert tied.parameters == 4 * 608 + 808 + 8
    assert tied.stage_parameters(tp=1, pp=2, stage=1) == 2 * 608 + 808 + 8  # the last stage's own copy


def test_key_value_cache_and_flops():
    assert SHAPES["Qwen2.5-7B"].kv_bytes_per_token(2) == 2 * 28 * 512 * 2 == 57_344
    # 2 FLOPs per weight: 4 x 608 x 2; attention 2 x 2 x 4 layers x 8 x context 10; one token in two reaches the head.
    assert TINY.forward_flops(tokens=100, context=10, heads=50) == 100 * (4864 + 1280) + 50 * 2 * 101 * 8


def test_shapes_come_from_config_json_or_by_name(tmp_path):
    hf = {"model_type": "qwen2", "vocab_size": 101, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    assert from_hf(hf) == TINY
    assert read_shape("models/Qwen3-8B-Base") == SHAPES["Qwen3-8B"]
    with pytest.raises(ConfigError, match="did you mean Qwen3-8B?"):
        read_shape("models/Qwen3-8C")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model type 'gpt2'; the plan knows llama, qwen2, qwen3"):
        read_shape(str(tmp_path))


# ---- memory -------------------------------------------------------------------------------------------------------


def test_state_of_a_rank():
    n = TINY.stage_parameters(1, 1, 0)
    state = memory.state_bytes(TINY, layout(), 0)
    assert (state.weights, state.gradients, state.optimizer) == (2 * n, 4 * n, 12 * n)
    sharded = memory.state_bytes(TINY, layout(world=4, use_distributed_optimizer=True), 0)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (2 * n, 4 * n, 3 * n)
    whole = layout_of(config(model={"dtype": "float32"}), 1, LayerSpec.LOCAL_CPU)
    assert memory.state_bytes(TINY, whole, 0).optimizer == 8 * n  # no second copy of float32 weights


# One sequence of 6 tokens. On a CPU a norm keeps two float32 copies and one bf16: 8 x (4 + 4 + 2) + 4 = 84 bytes a row.
# Attention: q 8, k 4, and the projection's output 16 that v is a view of, bf16; cosines and sines 4 x 2; its output
# twice, 8 each; 4 heads' sums in float32. The MLP: gate and up 32, and three of 16.
ROW_OF_ATTENTION = 2 * (8 + 4 + 16 + 4 * 2 + 2 * 8) + 4 * 4
ROW_OF_A_LAYER = 2 * 84 + ROW_OF_ATTENTION + 2 * 5 * 16
SIX = Packed(6, 6)


def test_what_a_layer_keeps_on_a_cpu():
    assert micro_batch_bytes(TINY, layout(), SIX).kept == 4 * 6 * ROW_OF_A_LAYER
    assert micro_batch_bytes(TINY, layout(), Packed(18, 6)).kept == 3 * 4 * 6 * ROW_OF_A_LAYER  # no padding, no matrix
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    recomputed = micro_batch_bytes(TINY, layout(transformer=full), SIX)
    assert (recomputed.kept, recomputed.layer) == (4 * 6 * 8 * 2, 6 * ROW_OF_A_LAYER)  # inputs; one layer at a time
    selective = micro_batch_bytes(TINY, layout(transformer={"recompute_granularity": "selective"}), SIX)
    # Made again: both outputs and the sums; kept meanwhile: the output that the projection wants.
    again = 6 * (2 * 2 * 8 + 4 * 4)
    assert selective.layer == again and selective.kept == 4 * (6 * (ROW_OF_A_LAYER + 2 * 8) - again)


def test_sequence_parallelism_cuts_the_norms_and_keeps_a_buffer():
    plain = layout(world=2, tensor_model_parallel_size=2)
    cut = layout(world=2, tensor_model_parallel_size=2, sequence_parallel=True)
    # TP2 halves all but norms, and of attention all but cosines and sines.
    row = ROW_OF_ATTENTION // 2 + 2 * 4 + 2 * 5 * 8
    assert micro_batch_bytes(TINY, plain, SIX).kept == 4 * 6 * (row + 2 * 84)
    assert micro_batch_bytes(TINY, cut, SIX).kept == 4 * 6 * (row + 84)
    assert (micro_batch_bytes(TINY, plain, SIX).buffer, micro_batch_bytes(TINY, cut, SIX).buffer) == (0, 6 * 8 * 2)


def test_context_parallelism_cuts_rows_and_gathers_keys():
    # CP2, a sequence of 8: 4 rows here. Of attention: q 8, cosines and sines, both outputs and the sums of 4 rows, k
    # and v of all 8; masks of two runs of 2 queries, which see 4 + 6 keys.
    cut = layout(world=2, context_parallel_size=2, use_distributed_optimizer=True)
    assert cut.dp == 1 and cut.optimizer_shards == 2
    attention = 4 * (2 * (8 + 8 + 2 * 8) + 4 * 4) + 8 * 2 * (4 + 4) + 2 * 10 * 2
    assert micro_batch_bytes(TINY, cut, Packed(8, 8)).kept == 4 * (4 * (2 * 84 + 2 * 5 * 16) + attention)
    n = TINY.stage_parameters(1, 1, 0)
    assert memory.state_bytes(TINY, cut, 0).optimizer == 6 * n
    # On a GPU each run of queries has its keys for itself: 2 + 8 or 4 + 6 rows of k and v; one output.
    gpu = layout(LayerSpec.LOCAL, world=2, context_parallel_size=2)
    attention = 4 * (2 * (8 + 8 + 8) + 4 * 4) + 10 * 2 * (4 + 4)
    assert micro_batch_bytes(TINY, gpu, Packed(8, 8)).kept == 4 * (4 * (2 * 36 + 2 * 5 * 16) + attention)


def test_what_a_layer_keeps_with_transformer_engine():
    # A norm's input and output, bf16, and 4 bytes; q, k, projection 8 + 4 + 16; output 8; sums 4 x 4.
    norm, attention = 8 * 2 * 2 + 4, 2 * (8 + 4 + 16 + 4 * 2 + 8) + 16
    te = LayerSpec.TRANSFORMER_ENGINE
    for spec in (te, LayerSpec.LOCAL):
        assert micro_batch_bytes(TINY, layout(spec), SIX).kept == 4 * 6 * (2 * norm + attention + 2 * 5 * 16)
    ring = layout(te, world=2, context_parallel_size=2)  # keys go round: none but this rank's are kept
    assert micro_batch_bytes(TINY, ring, Packed(12, 12)).kept == 4 * 6 * (2 * norm + attention + 2 * 5 * 16)


def test_the_head_never_holds_all_logits():
    shape = SHAPES["Qwen2.5-7B"]
    te = layout(LayerSpec.TRANSFORMER_ENGINE, world=2, tensor_model_parallel_size=2)
    # Scoring: a tile of 2048 columns of 4096 rows of float32 logits, and their hidden states in bf16.
    tile = 4096 * 2048 * 4 + 4096 * 3584 * 2
    assert memory.forward_peaks(shape, te, Packed(4608, 4608), 4096, stage=0).head in (0, tile)
    assert memory.forward_peaks(shape, te, Packed(4 * 4608, 4608), 4 * 4096, stage=0).head in (0, tile)
    # Updating: exponentials of 152064 / 2 columns in 38 tiles, in bf16; the float32 gradient of the hidden states
    # besides, and the chunk's. The weight's is in Megatron's buffer, or has a float32 sum if that is in bf16.
    updating = memory.update_peaks(shape, te, Packed(4608, 4608), 4096, 1, stage=0)
    expected = tile + 4096 * 38 * 2048 * 2 + 4608 * 3584 * 4 + 4096 * 3584 * 4
    assert updating.head == expected
    summed = dataclasses.replace(te, head_sums_gradient=True)
    assert memory.update_peaks(shape, summed, Packed(4608, 4608), 4096, 1, 0).head == expected + 76032 * 3584 * 4
    # Sequence parallelism gathers the hidden states of all 4608 rows.
    gathers = dataclasses.replace(te, sequence_parallel=True)
    assert memory.update_peaks(shape, gathers, Packed(4608, 4608), 4096, 1, 0).head == updating.head + 4608 * 3584 * 2


def test_earlier_pipeline_stages_hold_more_micro_batches():
    cut = layout(world=4, pipeline_model_parallel_size=4)
    kept = micro_batch_bytes(TINY, cut, SIX).kept
    peaks = [memory.update_peaks(TINY, cut, SIX, 4, 8, stage).saved for stage in range(4)]
    assert [peak - kept * (4 - stage) for stage, peak in enumerate(peaks[:3])] == [0, 0, 0]
    assert memory.update_peaks(TINY, cut, SIX, 4, 2, 0).saved == 2 * kept  # two micro-batches are all there are


def test_interleaved_stages_hold_more_but_smaller_chunks():
    # Two stages of two chunks, one layer each. Warm-up: 2 x (2 - 1 - stage) + (2 - 1) x 2 = 4 and 2; one more in 1F1B.
    cut = layout(world=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert [cut.chunks_in_flight(stage, 8) for stage in (0, 1)] == [5, 3]
    assert cut.chunks_in_flight(0, 1) == 4  # rounded up to two micro-batches of two chunks
    assert micro_batch_bytes(TINY, cut, SIX).kept == 6 * ROW_OF_A_LAYER
    assert memory.update_peaks(TINY, cut, SIX, 4, 8, 0).saved == 5 * 6 * ROW_OF_A_LAYER
    assert bubble(2, 8, chunks=2) == pytest.approx(1 / 17)
    deeper = layout(world=4, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3)
    assert [deeper.chunks_in_flight(stage, 99) for stage in range(4)] == [15, 13, 11, 9]


def test_micro_batches_are_filled_with_what_is_longest_or_fills_best():
    work = workload_of(config(train={"max_tokens_per_micro_batch": 10_000}, data={"max_prompt_length": 512},
                              rollout={"max_response_length": 4096}))  # fmt: skip
    assert (work.sequences(512), work.sequences(4608), work.sequences(20_000)) == (19, 2, 1)
    # Two of 4608 fill it less than shorter ones do; 3 of 512 are all there are; a long one goes alone.
    assert work.most_tokens(4608, 100) == 10_000 and work.most_tokens(512, 3) == 1536
    assert work.most_tokens(20_000, 100) == 20_000
    assert work.micro_batches(4, 4608) == 128 * 8 // 4 // 2


def test_a_colocated_engine_has_the_gpu_while_it_samples():
    """And its weights arrive beside all of the trainer's state; while the trainer computes it is asleep."""
    options = ["vllm.gpu_memory_utilization=0.5"]
    plan = make_plan(configuration.load(QWEN_7B, options))
    stay = make_plan(configuration.load(QWEN_7B, [*options, "rollout.offload_trainer=false"]))
    rollout, update = phase(plan, "rollout"), phase(plan, "update")
    assert (rollout.weights, rollout.gradients, rollout.optimizer) == (0, 0, 0)
    assert rollout.engine + rollout.kv_cache + rollout.workspace == int(79.3 * GIB) // 2
    assert phase(plan, "scores").engine == phase(plan, "log-probs").engine == update.engine == VLLM_ASLEEP_BYTES
    sync = phase(plan, "weight sync")
    assert sync.engine == VLLM_ASLEEP_BYTES + 7_615_616_512 * 2
    assert (sync.weights, sync.gradients, sync.optimizer) == (update.weights, update.gradients, update.optimizer)
    assert sync.workspace == (256 << 20) + 152064 * 3584 * 2  # TP2: a bucket, and the embedding in one of its own
    state = update.weights + update.gradients + update.optimizer
    assert phase(stay, "rollout").total == rollout.total + state and phase(stay, "update") == update
    assert (plan.host.offloaded, stay.host.offloaded) == (8 * (update.weights + update.optimizer), 0)


def test_weights_arrive_beside_the_trainer_without_purification_too():
    grpo = make_plan(configuration.load(QWEN_7B, ["lens.enabled=false"]))
    assert [phase.phase for phase in grpo.phases] == ["weight sync", "rollout", "log-probs", "update"]
    assert phase(grpo, "weight sync").engine == VLLM_ASLEEP_BYTES + 7_615_616_512 * 2


def test_key_value_cache_of_an_engine_over_several_gpus():
    one = layout()
    of = {size: dataclasses.replace(one, engine_tp=size) for size in (1, 2, 4)}
    # TINY has two key-value heads of 2: 2 x 4 layers x 4 x 2 bytes a token; on four GPUs each head stands twice.
    assert [cache_bytes(TINY, of[size], 10) for size in (1, 2, 4)] == [640, 320, 320]


def test_the_cache_must_hold_all_running_sequences_and_the_longest_that_vllm_admits():
    """Qwen2.5-7B: 57,344 bytes a token. 15 GiB of cache hold 60 sequences of 4608 tokens, two of 131,072."""

    def suffices(*options: str) -> bool:
        plan = make_plan(configuration.load(QWEN_7B, [f"vllm.kv_cache_memory_bytes={15 * GIB}", *options]))
        assert phase(plan, "rollout").kv_cache == 15 * GIB
        enough = cache_suffices(plan.shape, plan.layout, plan.work, plan.cluster)
        assert enough is not any(mistake.startswith("rollout") for mistake in plan.mistakes)
        return enough

    assert suffices("rollout.max_running_sequences=60") and not suffices("rollout.max_running_sequences=61")
    assert suffices("rollout.max_running_sequences=61", "vllm.max_num_seqs=60")
    assert not suffices("rollout.max_running_sequences=8", "vllm.max_model_len=300000")
    assert not suffices() and suffices("rollout.prompts_per_step=16")  # 2 prompts x 8 rollouts x 2 waves


def test_host_memory_of_a_node():
    """Two pipeline stages of TP2, four data-parallel ranks of each, on two nodes of eight."""
    n = max(TINY.stage_parameters(2, 2, stage) for stage in (0, 1))
    tree = {"cluster": {"nodes": 2}, "megatron": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True}, "rollout": {"engine": "vllm"}}  # fmt: skip

    def found(**sections: dict):
        settings = config(**tree | sections)
        cut = layout_of(settings, 16, LayerSpec.TRANSFORMER_ENGINE)
        return host_bytes(TINY, cut, workload_of(settings), cluster_of(settings.cluster))

    # Weights 2 bytes, optimizer 12 / 4. Four ranks hold the weights that count, all eight a part of the optimizer.
    once = 4 * 2 * n + 8 * 3 * n
    exported = min(2 * TINY.parameters, 8 * EXPORT_SHARD_BYTES)
    default = found()
    assert (default.reference, default.offloaded, default.checkpoint) == (8 * 2 * n, 8 * 5 * n, once + exported)
    assert (default.sent_weights, default.before_updates) == (0, 0)
    assert default.total == default.reference + default.offloaded + default.checkpoint
    assert found(train={"updates_per_batch": 2}).before_updates == once
    # Three ranks drive a server each and keep what they sent to it.
    assert found(rollout={"engine": "vllm_server", "servers": 3}).sent_weights == 3 * 2 * TINY.parameters
    assert found(rollout={"engine": "vllm_server", "servers": 64}).sent_weights == 8 * 2 * TINY.parameters
    plain = found(lens={"enabled": False}, algorithm={"kl_coef": 0, "advantage": "grpo"})
    assert plain.reference == 0


def test_servers_take_nothing_of_the_trainers_gpus():
    options = ["rollout.engine=vllm_server", "rollout.servers=4", "rollout.max_running_sequences=64"]
    planned = make_plan(configuration.load(QWEN_7B, options))
    rollout, update = phase(planned, "rollout"), phase(planned, "update")
    assert (rollout.engine, rollout.kv_cache, update.engine) == (0, 0, 0)
    assert rollout.total < update.total and planned.running == 64  # 32 prompts x 8 are each server's share


def test_rollout_of_the_local_engine():
    planned = make_plan(configuration.load(QWEN_7B, LOCAL))
    rollout = phase(planned, "rollout")
    assert rollout.engine == 7_615_616_512 * 2  # a whole model in every process
    assert rollout.kv_cache == 64 * 4608 * 57_344
    assert [phase.phase for phase in planned.phases] == ["scores", "weight sync", "rollout", "log-probs", "update"]
    assert planned.host.offloaded == 0
    grpo = make_plan(configuration.load(QWEN_7B, [*LOCAL, "lens.enabled=false", "algorithm.kl_coef=0"]))
    assert [phase.phase for phase in grpo.phases] == ["weight sync", "rollout", "update"] and grpo.host.reference == 0


def test_checkpoint_holds_every_tensor_once():
    # Whatever the data-parallel ranks: weights (2 B), master and moments (12 B); and the Hugging Face model.
    for world in (1, 2):
        ranks = layout(world=world, use_distributed_optimizer=True)
        assert checkpoint_bytes(TINY, ranks) == TINY.parameters * (2 + 12) + 2 * TINY.parameters


# ---- time ---------------------------------------------------------------------------------------------------------


def test_bubble_and_sync():
    assert bubble(1, 8) == 0 and bubble(4, 13) == pytest.approx(3 / 16)
    plan = make_plan(configuration.load(QWEN_7B))
    assert plan.sync.bytes_per_engine == 7_615_616_512 * 2
    assert plan.sync.bytes_received == 7_615_616_512  # TP2: the other half
    alone = layout(LayerSpec.TRANSFORMER_ENGINE)
    assert weight_sync(SHAPES["Qwen2.5-7B"], alone, plan.cluster, Assumptions()).bytes_received == 0


def test_seconds_of_update_and_rollout():
    settings = config(
        cluster={"gpus_per_node": 1}, rollout={"prompts_per_step": 4, "rollouts_per_prompt": 2, "engine": "vllm",
        "max_response_length": 1000}, data={"max_prompt_length": 200}, lens={"enabled": False},
        train={"max_tokens_per_micro_batch": 1200}, algorithm={"advantage": "grpo", "kl_coef": 0}
    )  # fmt: skip
    shape, cluster = SHAPES["Qwen2.5-7B"], cluster_of(settings.cluster)
    made = layout_of(settings, 1, LayerSpec.TRANSFORMER_ENGINE)
    times = {t.phase: t.seconds for t in step_times(shape, made, workload_of(settings), cluster, Assumptions(), 8)}
    assert list(times) == ["rollout", "offload", "update", "weight sync"]
    # Weights and optimizer, 2 + 12 bytes a parameter, to the host and back at 20 GB/s.
    assert times["offload"] == pytest.approx(2 * 14 * 7_615_616_512 / 20e9)
    # Mean 100 + 500 tokens, seeing 300 on average; 500 of them at the head; three times forward, 312 TFLOP/s, 40 %.
    layers = 28 * shape.layer_parameters(1)
    flops = 600 * (2 * layers + 4 * 28 * 3584 * 300) + 500 * 2 * 152064 * 3584
    assert times["update"] == pytest.approx(8 * flops * 3 / (312e12 * 0.4))
    # All eight run at once to the longest: 1000 steps of 15.2 GB, at 70 % of 2039 GB/s; cache 4000 tokens x 350.
    weights, cache = 1000 * 7_615_616_512 * 2, 8 * 500 * (100 + 250) * 57_344
    assert times["rollout"] == pytest.approx((weights + cache) / (2039e9 * 0.7))


def test_speculation_ends_both_waves_together_and_samples_some_tokens_for_nothing():
    def rollout_seconds(schedule: str) -> float:
        sections = {"cluster": {"gpus_per_node": 1}, "train": {"max_tokens_per_micro_batch": 1200}}
        settings = config(
            **sections, data={"max_prompt_length": 200},
            rollout={"prompts_per_step": 4, "rollouts_per_prompt": 2, "engine": "vllm", "max_response_length": 1000,
                     "schedule": schedule},
        )  # fmt: skip
        made = layout_of(settings, 1, LayerSpec.TRANSFORMER_ENGINE)
        cluster, assumed = cluster_of(settings.cluster), Assumptions(discarded_share=0.2)
        times = step_times(SHAPES["Qwen2.5-7B"], made, workload_of(settings), cluster, assumed, 16)
        return next(time.seconds for time in times if time.phase == "rollout")

    # 8 sequences and half as many again, all at once: 500 steps and then a tail of 500, or two tails.
    weights, token = 7_615_616_512 * 2, (100 + 250) * 57_344
    bandwidth = 2039e9 * 0.7
    assert rollout_seconds("streamed") == rollout_seconds("sequential")
    assert rollout_seconds("streamed") == pytest.approx((1500 * weights + 12 * 500 * token) / bandwidth)
    assert rollout_seconds("speculative") == pytest.approx((1000 * weights + 15 * 500 * token) / bandwidth)


def test_rescued_rows_cost_a_pass_unless_their_ratio_is_against_the_original_prompt():
    def log_probs(**algorithm: object) -> list[str]:
        settings = config(cluster={"gpus_per_node": 1}, algorithm={"kl_coef": 0, **algorithm})
        made, cluster = layout_of(settings, 1, LayerSpec.TRANSFORMER_ENGINE), cluster_of(settings.cluster)
        times = step_times(SHAPES["Qwen2.5-7B"], made, workload_of(settings), cluster, Assumptions(), 8)
        return [time.how for time in times if time.phase == "log-probs"]

    assert log_probs() == ["old for 10% of the rollouts"] and log_probs(rescued_ratio="original_prompt") == []
    assert log_probs(rescued_ratio="original_prompt", ratio_form="acl") == ["old for 100% of the rollouts"]


# ---- the program --------------------------------------------------------------------------------------------------


def test_the_table(capsys):
    assert program.main([QWEN_7B]) == 0
    out = capsys.readouterr().out
    for words in ("GiB per GPU", "scores", "rollout", "log-probs", "update", "main gradients", "LM head and loss",
                  "KV cache", "free of 79.3", "seconds per step", "weight sync: 15.23 GB", "MFU 40%"):  # fmt: skip
        assert words in out
    assert max(map(len, out.splitlines())) <= 170


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["megatron.tensor_model_parallel_size=8"],
         "megatron.tensor_model_parallel_size (8) does not divide the model's num_key_value_heads (4); choose a"),
        (["megatron.pipeline_model_parallel_size=8", "megatron.tensor_model_parallel_size=1"],
         "megatron.pipeline_model_parallel_size (8) does not divide the model's num_hidden_layers (28); choose a"),
        (["cluster.nodes=3", "cluster.gpus_per_node=1"], "cluster.nodes (3) x cluster.gpus_per_node (1): world"),
        (["rollout.prompts_per_step=6"], "rollout.prompts_per_step (6) is not divisible by data-parallel size (4)"),
        (["rollout.max_response_length=140000"], "= 140512 exceeds the model's max_position_embeddings (131072)"),
        ([*LOCAL, "rollout.max_running_sequences=128"],
         "rollout: needs 82.2 GiB per GPU, a GPU of this cluster has 79.3; the largest part is kv cache with 31.5 GiB; "
         "it fits with rollout.max_running_sequences=64"),
        (["cluster.gpu_memory_gib=40"], "no layout on this cluster makes it fit; take more GPUs"),
        (["cluster.host_memory_gib=200"],
         "host memory: needs 312.1 GiB per node, cluster.host_memory_gib is 200.0; the largest part is offloaded with "
         "141.9 GiB; no single change makes it fit; take nodes with more memory, or raise"),
        (["cluster.host_memory_gib=360", "train.updates_per_batch=2"], "; it fits with train.updates_per_batch=1"),
        (["cluster.host_memory_gib=200", "vllm.gpu_memory_utilization=0.5", "rollout.max_running_sequences=64"],
         "; it fits with rollout.offload_trainer=false"),
        (["vllm.gpu_memory_utilization=0.2"],
         "vllm.gpu_memory_utilization (0.2) leaves -1.3 GiB per GPU for the KV cache, beside 14.2 GiB of weights and "
         "3.0 GiB of workspace; vLLM does not start without room for its longest sequence, whose 131072 tokens "
         "(vllm.max_model_len) need 7.0 GiB; it fits with vllm.gpu_memory_utilization=0.85"),
        (["vllm.gpu_memory_utilization=0.6"],
         "vllm.gpu_memory_utilization (0.6) leaves 30.4 GiB per GPU for the KV cache, which holds 123 sequences of "
         "4608 tokens; rollout.max_running_sequences (192) lets 192 run at once, which need 47.2 GiB; it fits with "
         "vllm.gpu_memory_utilization=0.85"),
        (["rollout.max_running_sequences=256", "vllm.gpu_memory_utilization=0.9"],
         "lets 256 run at once, which need 63.0 GiB; it fits with rollout.max_running_sequences=220"),
        (["vllm.kv_cache_memory_bytes=1000000000"],
         "vllm.kv_cache_memory_bytes (1000000000) leaves 0.9 GiB per GPU for the KV cache, beside 14.2 GiB of weights"),
        (["vllm.tensor_parallel_size=8"], "vllm.tensor_parallel_size (8) does not divide the m"),
        (["vllm.tensor_parallel_size=4", "cluster.gpus_per_node=2", "cluster.nodes=4"],
         "vllm.tensor_parallel_size (4) does not divide the ranks of a node (2)"),
        (["vllm.gpu_memory_utilization=0.6", "rollout.max_running_sequences=64", "rollout.offload_trainer=false"],
         "it fits with rollout.offload_trainer=true"),
        (["vllm.gpu_memory_utilization=0.97"],
         "it fits with vllm.gpu_memory_utilization=0.92"),
        (["train.max_tokens_per_micro_batch=40000"], "update: needs"),
        (["megatron.virtual_pipeline_model_parallel_size=2"], "interleaves the stages of a pipeline, but"),
        (["megatron.sequence_parallel=true", "megatron.tensor_model_parallel_size=1"], "or set sequence_parallel to f"),
        (["megatron.context_parallel_size=3"], "megatron.context_parallel_size (3) = 6; start torchrun with a mult"),
        (["model.path=models/unknown"], "model.path models/unknown: no config.json there"),
        (["lens.tua=1"], "unknown option lens.tua; did you mean lens.tau?"),
    ],
)  # fmt: skip
def test_what_is_refused_names_both_values_and_a_remedy(capsys, overrides, message):
    assert message in refused(capsys, QWEN_7B, *overrides)


def test_a_remedy_is_one():
    tight = ["train.max_tokens_per_micro_batch=40000"]
    (mistake,) = [m for m in make_plan(configuration.load(QWEN_7B, tight)).mistakes if m.startswith("update")]
    assert mistake.endswith("it fits with train.max_tokens_per_micro_batch=4608")
    assert not make_plan(configuration.load(QWEN_7B, [*tight, "train.max_tokens_per_micro_batch=4608"])).mistakes


def test_the_same_words_as_the_trainer():
    from lens_megatron.config.layout_rules import model_mistakes
    from lens_megatron.policy.model import check_layout

    for overrides in (
        ["megatron.tensor_model_parallel_size=8"], ["megatron.pipeline_model_parallel_size=8"],
        ["rollout.max_response_length=140000"], ["megatron.virtual_pipeline_model_parallel_size=2"],
        ["megatron.virtual_pipeline_model_parallel_size=3", "megatron.pipeline_model_parallel_size=2"],
        ["megatron.tensor_model_parallel_size=1"], ["megatron.expert_model_parallel_size=2"],
    ):  # fmt: skip
        settings = configuration.load(QWEN_7B, overrides)
        with pytest.raises(ConfigError) as caught:
            check_layout(settings, SHAPES["Qwen2.5-7B"])
        assert str(caught.value) == next(model_mistakes(settings, SHAPES["Qwen2.5-7B"]))


def test_memory_of_another_gpu_and_of_no_option():
    assert cluster_of(config(cluster={"gpu_memory_gib": 40}).cluster).memory_bytes == 40 * GIB
    assert cluster_of(config(cluster={"gpu": "H200-141GB"}).cluster).memory_bytes == int(139.8 * GIB)


@pytest.mark.slow
def test_a_real_run_syncs_and_saves_what_was_planned_and_may_change_its_cluster(toy, tmp_path):
    tree = toy.tree(
        tmp_path / "run",
        model={"path": str(toy.model), "dtype": "bfloat16"},
        megatron={"use_distributed_optimizer": True},
        cluster={"gpus_per_node": 2},
    )
    planned = make_plan(from_tree(tree))
    rows = launch(tree, tmp_path / "first", 2)
    assert rows[-1]["perf/weight_sync_bytes"] == planned.sync.bytes_per_engine
    files = (tmp_path / "run" / "checkpoints" / "iter_0000002").rglob("*.safetensors")
    tensors = [load_file(file) for file in files]  # generators, 30 kB a rank, weigh in a toy alone
    size = sum(x.nbytes for file in tensors for name, x in file.items() if not name.startswith("rng/"))
    assert size == pytest.approx(planned.checkpoint_bytes, rel=0.001)
    tree |= {"cluster": {"gpus_per_node": 1}, "train": {**tree["train"], "steps": 3}}
    assert launch(tree, tmp_path / "second", 2)[-1]["step"] == 3
