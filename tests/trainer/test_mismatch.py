"""Engine beside trainer: corrections and statistics worked by hand, and the real program on rollouts tampered with.

That neither depends on the layout is in test_layouts.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chosen import objective
from records import rollout, sample, training_rows
from toy_runs import Toy, run_program

from lens_megatron.algorithms.corrections import CORRECTIONS
from lens_megatron.algorithms.mismatch import Mismatch, mismatch, mismatch_sums, pooled
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig, ConfigError, from_tree
from lens_megatron.output.metrics import mismatch_metrics, mismatch_warning, read_metrics
from lens_megatron.phases.update import is_on_policy
from lens_megatron.results import MismatchSums, UpdateStats
from lens_megatron.types import Origin, Rollout, TokenTerms

WORKED = torch.tensor([-0.5, -2.0, -0.1]) - torch.tensor([-0.6, -1.2, -0.1])
"""The reference's rescued row, read as trainer and engine: w = 1.105171, .449329, 1; product .496585, mean .791890."""
REQUIRED = {"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}
RATIOS = torch.tensor([1.5, 0.4, 3.0, 0.9], dtype=torch.float64).log()
"""Their product is 1.62, their geometric mean 1.128171."""


@pytest.mark.parametrize(
    ("name", "log_ratio", "bounds", "weights", "limited"),
    [
        ("none", RATIOS, (0.5, 2.0), [1.0] * 4, [0, 0, 0, 0]),
        ("token_truncate", RATIOS, (0.5, 2.0), [1.5, 0.4, 2.0, 0.9], [0, 0, 1, 0]),
        ("token_truncate", RATIOS, (0.5, 3.5), [1.5, 0.4, 3.0, 0.9], [0, 0, 0, 0]),
        ("token_truncate", WORKED, (0.5, 1.0), [1.0, 0.449329, 1.0], [1, 0, 0]),
        ("token_mask", RATIOS, (0.5, 2.0), [1.5, 0.0, 0.0, 0.9], [0, 1, 1, 0]),
        ("token_mask", WORKED, (0.5, 2.0), [1.105171, 0.0, 1.0], [0, 1, 0]),
        ("sequence_truncate", RATIOS, (0.5, 2.0), [1.62] * 4, [0, 0, 0, 0]),
        ("sequence_truncate", RATIOS, (0.5, 1.5), [1.5] * 4, [1, 1, 1, 1]),
        ("sequence_truncate", WORKED, (0.5, 2.0), [0.496585] * 3, [0, 0, 0]),
        ("sequence_mask", RATIOS, (0.5, 2.0), [1.62] * 4, [0, 0, 0, 0]),
        ("sequence_mask", RATIOS, (0.5, 1.5), [0.0] * 4, [1, 1, 1, 1]),
        ("sequence_mask", WORKED, (0.5, 2.0), [0.0] * 3, [1, 1, 1]),
        ("sequence_geometric_mask", RATIOS, (0.5, 1.2), [1.0] * 4, [0, 0, 0, 0]),
        ("sequence_geometric_mask", RATIOS, (0.5, 1.1), [0.0] * 4, [1, 1, 1, 1]),
        ("sequence_geometric_mask", WORKED, (0.5, 2.0), [1.0] * 3, [0, 0, 0]),
        ("sequence_geometric_mask", WORKED, (0.8, 2.0), [0.0] * 3, [1, 1, 1]),
    ],
)
def test_corrections_worked_by_hand(name, log_ratio, bounds, weights, limited):
    found = CORRECTIONS[name](log_ratio, *bounds)
    assert found.weights.tolist() == pytest.approx(weights, abs=1e-6)
    assert found.limited.tolist() == list(map(bool, limited))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_an_engine_that_agrees_is_not_corrected(name):
    """Bounds belong to what is kept; the weight is 1 exactly. A response without tokens passes too."""
    found = CORRECTIONS[name](torch.zeros(3), 1.0, 1.0)
    assert found.weights.tolist() == [1.0] * 3 and not found.limited.any()
    assert CORRECTIONS[name](torch.zeros(0), 1.0, 1.0).weights.shape == (0,)


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "none"])
def test_a_number_that_is_none_is_not_masked_away(name):
    """The update is skipped and the batch written down. An engine that claims probability 0 is only an extreme w."""
    assert CORRECTIONS[name](torch.tensor([0.1, math.nan]), 0.5, 2.0).weights.isnan().any()
    extreme = CORRECTIONS[name](torch.tensor([0.1, math.inf]), 0.5, 2.0)
    assert extreme.weights.isfinite().all() and extreme.limited[1]


def engine_says(made: Rollout, *log_probs: float) -> Rollout:
    return replace(made, log_probs=log_probs)


def worked_terms(algorithm: AlgorithmConfig) -> TokenTerms:
    """The reference's rescued row, whose engine was off: w = 0.5, 3 and 1."""
    old = torch.tensor([-0.6, -1.2, -0.1])
    engine = (old.double() - torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64).log()).tolist()
    row = sample(engine_says(rollout(True, Origin.PURIFIED, (1, 1, 1)), *engine), 0.904534, 0.75)
    return pack.pack(
        training_rows([row], [old], [torch.zeros(3)]),
        scale=pack.count([row]),
        algorithm=algorithm,
        max_response_length=3,
        parts=[[0]],
        device=torch.device("cpu"),
    )[0].terms


def test_the_loss_is_decoupled_and_weights_have_no_gradient():
    """-w~ A / 3 * (0.5 x 1.105171 + 2 x .449329 + 1 x 1), no ratio is clipped; the clip sees rho alone."""
    algorithm = AlgorithmConfig(correction="token_truncate", kl_coef=0.0)
    new = torch.tensor([-0.5, -2.0, -0.1], requires_grad=True)
    result = objective(algorithm).losses(new, torch.zeros(3), worked_terms(algorithm), algorithm)
    result.losses.sum().backward()
    assert result.losses.sum().item() == pytest.approx(-0.75 * 0.904534 / 3 * 2.451244, abs=1e-6)
    weighted_ratios = [0.5 * 1.105171, 2 * 0.449329, 1.0]
    assert new.grad.tolist() == pytest.approx([-0.25 * 0.904534 * x for x in weighted_ratios], abs=1e-6)
    assert result.ratio.tolist() == pytest.approx([1.105171, 0.449329, 1.0], abs=1e-6)


def test_only_the_policy_term_is_weighted():
    options = {"kl_coef": 0.3, "entropy_coef": 0.2, "imitation_coef": 0.1}
    plain = worked_terms(AlgorithmConfig(**options))
    terms = worked_terms(AlgorithmConfig(correction="token_mask", **options))
    assert terms.policy_weights.tolist() == pytest.approx([0.125, 0.0, 0.25])
    assert terms.corrections.tolist() == pytest.approx([0.5, 0.0, 1.0]) and terms.limited.tolist() == [
        False,
        True,
        False,
    ]
    for name in ("kl_weights", "entropy_weights", "imitation_weights", "old_log_probs", "advantages"):
        assert getattr(terms, name).equal(getattr(plain, name)), name
    assert plain.corrections.tolist() == [1.0] * 3 and not plain.limited.any()


def test_the_acl_forms_shift_of_the_old_log_prob_is_no_mismatch():
    terms = worked_terms(AlgorithmConfig(correction="sequence_truncate", correction_high=9.0, ratio_form="acl"))
    assert terms.corrections.tolist() == pytest.approx([1.5] * 3, rel=1e-5)
    assert terms.trainer_log_probs.tolist() == pytest.approx([-0.6, -1.2, -0.1])


def test_a_row_keeps_its_exact_ratio_and_is_corrected_all_the_same():
    """On-policy: old is None, so the ratio is 1 to the bit; the correction takes the trainer's own pass."""
    row, algorithm = sample(engine_says(rollout(True), -1.0, -2.0)), AlgorithmConfig(correction="token_truncate")
    arguments = {
        "scale": pack.count([row]),
        "algorithm": algorithm,
        "max_response_length": 2,
        "parts": [[0]],
        "device": torch.device("cpu"),
    }
    rows = training_rows([row], trainer=[torch.tensor([-1.5, -1.9])])
    terms = pack.pack(rows, **arguments)[0].terms
    assert terms.old_log_probs.isnan().all()
    assert terms.corrections.tolist() == pytest.approx([math.exp(-0.5), math.exp(0.1)], rel=1e-6)
    with pytest.raises(ValueError, match="correction=token_truncate needs the trainer's log-probabilities"):
        pack.pack(training_rows([row]), **arguments)


def test_on_policy_are_native_rows_that_the_weights_of_now_have_sampled():
    """One update per batch: whatever the correction. Several updates, or the acl form: no row is."""
    native, older = sample(rollout(True)), sample(replace(rollout(True), weight_version=1))
    rescued = sample(rollout(True, Origin.PURIFIED))
    single = from_tree(REQUIRED | {"algorithm": {"correction": "token_mask"}})
    assert is_on_policy(single, native, version=0) and is_on_policy(single, older, version=1)
    assert not is_on_policy(single, native, version=1) and not is_on_policy(single, older, version=2)
    assert not is_on_policy(single, older, version=0), "loaded rollouts of a run that was further"
    assert not is_on_policy(single, rescued, version=0)
    several = {"rollout": {"prompts_per_step": 4}, "train": {"updates_per_batch": 2}}
    for sections in (several, {"algorithm": {"ratio_form": "acl"}}):
        assert not is_on_policy(from_tree(REQUIRED | sections), native, version=0)


def summed(p: torch.Tensor, q: torch.Tensor) -> MismatchSums:
    weights, limited = torch.full_like(p, 0.75), torch.arange(len(p)) % 2 == 0
    return MismatchSums(*mismatch_sums(p.log(), q.log(), weights, limited).tolist())


def test_statistics_worked_by_hand():
    """p = .5 .2 .8, q = .4 .2 .9. |p - q| = .1 0 .1; deviations 0 -.3 .3 and -.1 -.3 .4; p/q = 1.25 1 .888889."""
    found = mismatch(summed(torch.tensor([0.5, 0.2, 0.8]), torch.tensor([0.4, 0.2, 0.9])))
    expected = Mismatch(
        mean=0.2 / 3,
        std=0.057735,
        largest=0.1,
        pearson=0.21 / math.sqrt(0.18 * 0.26),
        kl=(-0.223144 + 0.117783) / 3,
        k3=(0.026856 + 0.006672) / 3,
        weight=0.75,
        limited=2 / 3,
    )
    for name in Mismatch.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-6), name


def test_statistics_are_torchs_however_the_tokens_are_divided():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1000, generator=generator, dtype=torch.float64)
    q = (p + 1e-3 * torch.randn(1000, generator=generator, dtype=torch.float64)).clamp(1e-3, 1.0)
    found = mismatch(pooled([summed(a, b) for a, b in zip(p.split(170), q.split(170), strict=True)] + [MismatchSums()]))
    difference = (p - q).abs()
    assert found.mean == pytest.approx(float(difference.mean()), rel=1e-9)
    assert found.std == pytest.approx(float(difference.std()), rel=1e-9)
    assert found.largest == pytest.approx(float(difference.max()), rel=1e-9)
    assert found.pearson == pytest.approx(float(torch.corrcoef(torch.stack([p, q]))[0, 1]), rel=1e-9)
    assert found.kl == pytest.approx(float((q.log() - p.log()).mean()), rel=1e-9)


def test_a_constant_has_no_correlation_and_no_tokens_no_metrics():
    assert {mismatch(summed(torch.full((n,), 0.3), torch.rand(n))).pearson for n in range(2, 200)} == {None}
    assert mismatch(summed(torch.tensor([0.3]), torch.tensor([0.4]))).std == 0.0
    empty = mismatch_sums(*[torch.zeros(0)] * 4)
    assert MismatchSums(*empty.tolist()) == MismatchSums()
    assert mismatch_metrics((), "none") == {}


NONE = MismatchSums()


def stats(native: MismatchSums, rescued: MismatchSums = NONE) -> UpdateStats:
    return UpdateStats(*[0.0] * 12, skipped=False, mismatch_native=native, mismatch_rescued=rescued)


def test_metrics_have_verls_names_for_all_native_and_rescued_tokens():
    """Two updates: 3 native tokens off by 0.1, then 1 by 0.3 with 2 rescued by 0.2."""
    third = torch.tensor([0.2, 0.3, 0.5])
    first = stats(summed(third, third + 0.1))
    second = stats(summed(torch.tensor([0.5]), torch.tensor([0.2])), summed(third[:2], third[:2] + 0.2))
    found = mismatch_metrics((first, second), "sequence_mask")
    name = "training/rollout_probs_diff"
    assert found[f"{name}_mean"] == pytest.approx(1.0 / 6) and found[f"{name}_max"] == pytest.approx(0.3)
    assert found[f"{name}_mean_native"] == pytest.approx(0.15) and found[f"{name}_mean_rescued"] == pytest.approx(0.2)
    assert found["training/rollout_actor_probs_pearson_corr_rescued"] == pytest.approx(1.0)
    assert found["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(4 / 6)
    assert found["rollout_corr/rollout_is_mean_native"] == 0.75 and "rollout_corr/k3_kl_rescued" in found
    alone = mismatch_metrics((first,), "none")
    assert not any("rescued" in key or "rollout_is" in key or "masked" in key for key in alone)
    assert "rollout_corr/rollout_is_ratio_fraction_high" in mismatch_metrics((first,), "token_truncate")


@pytest.mark.parametrize(
    ("native", "rescued", "expected"),
    [
        (0.0049, 0.001, None),
        (0.0051, 0.001, "mismatch (limit 0.005): engine and trainer disagree on the sampled tokens' probabilities by "
         "0.0051 on native rows"),
        (0.001, 0.0101, "!!! ALARM (limit 0.01): engine and trainer disagree on the sampled tokens' probabilities by "
         "0.0101 on rescued rows"),
        (math.nan, 0.001, "!!! ALARM"),
    ],
)  # fmt: skip
def test_a_warning_and_then_an_alarm(native, rescued, expected):
    name = "training/rollout_probs_diff_mean"
    line = mismatch_warning({name: 0.0, f"{name}_native": native, f"{name}_rescued": rescued}, "none")
    assert line is None if expected is None else expected in line and "algorithm.correction=token_truncate" in line


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algorithm": {"correction": "token_mask", "ratio": "sequence"}}, "correction=token_mask weighs tokens"),
        ({"algorithm": {"correction": "tis"}}, "algorithm.correction: 'tis': Input should be 'none'"),
        ({"algorithm": {"correction_high": 0.9}}, "correction_high: 0.9: Input should be greater than or equal to 1"),
        ({"algorithm": {"correction_low": 1.1}}, "correction_low: 1.1: Input should be less than or equal to 1"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p: not offered: it samples from a part of the distribution"),
        ({"vllm": {"logprobs_mode": "raw_logprobs"}}, "vllm.logprobs_mode=raw_logprobs: sampled tokens would have"),
        ({"vllm": {"override_generation_config": {"top_k": 20}}}, "vllm.override_generation_config: sampled tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        from_tree(REQUIRED | sections)
    assert message in str(caught.value)


def test_what_goes_together_is_not_refused():
    for correction in CORRECTIONS:
        ratio = "token" if correction.startswith("token") else "sequence"
        from_tree(REQUIRED | {"algorithm": {"correction": correction, "ratio": ratio}})
    from_tree(REQUIRED | {"vllm": {"logprobs_mode": "processed_logprobs"}})


# ---- the real program ---------------------------------------------------------------------------------------------


def run(tree: dict, folder: Path, ranks: int = 1) -> tuple[dict, str]:
    """The last step's row of metrics, and what was printed."""
    result = run_program(tree, folder, ranks)
    return read_metrics(Path(tree["run"]["directory"]))[-1], result.stdout


@pytest.fixture(scope="module")
def sampled(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """A step whose rollouts are kept, its metrics and output."""
    folder = tmp_path_factory.mktemp("sampled")
    debug = {"save_rollouts": str(folder / "replay")}
    tree = toy.tree(folder / "run", debug=debug, train={"steps": 1})
    return folder / "replay", *run(tree, folder)


def test_the_embedded_engine_agrees_with_the_trainer(sampled):
    _, row, output = sampled
    for origin in ("native", "rescued"):
        assert 0 < row[f"training/rollout_probs_diff_mean_{origin}"] < 1e-5
        assert row[f"training/rollout_probs_diff_max_{origin}"] < 1e-4
        assert row[f"training/rollout_actor_probs_pearson_corr_{origin}"] > 0.999999
        assert abs(row[f"rollout_corr/kl_{origin}"]) < 1e-5
    assert "disagree" not in output and "rollout_corr/rollout_is_mean" not in row


def test_with_an_engine_that_agrees_a_correction_changes_nothing(toy: Toy, sampled, tmp_path: Path):
    replay, plain, _ = sampled
    corrected, _ = run(
        toy.tree(
            tmp_path / "run",
            debug={"load_rollouts": str(replay)},
            algorithm={"correction": "sequence_truncate"},
            train={"steps": 1},
        ),
        tmp_path,
    )
    assert corrected["actor/ratio_min"] == corrected["actor/ratio_max"] == 1.0
    assert corrected["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-4)
    for name in ("actor/pg_loss", "actor/grad_norm"):
        assert corrected[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6)


def test_an_engine_that_is_off_is_measured_corrected_and_announced(toy: Toy, sampled, tmp_path: Path):
    """Native rows claim 3 nats too much, so w = exp(-3); rescued ones 0.3 too little, so w = exp(0.3) is cut to 1.2.
    The same on two data-parallel ranks."""
    replay, plain, _ = sampled
    tampered = tmp_path / "replay"
    tampered.mkdir()
    groups = [json.loads(line) for line in (replay / "step_000001.jsonl").read_text().splitlines()]
    for group in groups:
        for name, shift in (("native", 3.0), ("rescue", -0.3)):
            for row in group[name]:
                row["log_probs"] = [x + shift for x in row["log_probs"]]
    (tampered / "step_000001.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    sections = {
        "debug": {"load_rollouts": str(tampered)},
        "algorithm": {"correction": "token_truncate", "correction_high": 1.2},
        "train": {"steps": 1},
    }
    rows = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        row, output = run(toy.tree(folder / "run", **sections), folder, ranks)
        rows.append(row)
        assert output.count("!!! ALARM (limit 0.01): engine and trainer disagree") == 1
        assert row["rollout_corr/kl_native"] == pytest.approx(3.0, abs=1e-5)
        assert row["rollout_corr/kl_rescued"] == pytest.approx(-0.3, abs=1e-5)
        assert row["rollout_corr/rollout_is_mean_native"] == pytest.approx(math.exp(-3.0), rel=1e-5)
        assert row["rollout_corr/rollout_is_mean_rescued"] == pytest.approx(1.2, rel=1e-5)
        assert row["rollout_corr/rollout_is_ratio_fraction_high_native"] == 0.0
        assert row["rollout_corr/rollout_is_ratio_fraction_high_rescued"] == 1.0
    for name in rows[0]:
        if name.startswith(("training/rollout", "rollout_corr/", "actor/pg_loss", "actor/grad_norm")):
            assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-8), name
    assert rows[0]["actor/grad_norm"] != pytest.approx(plain["actor/grad_norm"], rel=1e-3)
