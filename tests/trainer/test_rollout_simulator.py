"""The simulator of continuous batching, against numbers worked out by hand."""

from benchmarks.sampling.simulator import Cost, Setting, SimulatedGroup, simulate

UNIT = Cost(fixed=1.0, weights=0.0, per_sequence=0.0, per_kv_token=0.0)
"""A second per step, whatever runs."""


def group(native: list[tuple[int, int]], rescue: list[tuple[int, int]] = (), prompt: int = 10) -> SimulatedGroup:
    return SimulatedGroup(
        prompt, tuple((n, bool(ok)) for n, ok in native), tuple((n, bool(ok)) for n, ok in rescue or native)
    )


def test_seconds_of_steps():
    """3 steps of 2 sequences, 20 tokens in the cache: 3*(1 + max(.5, 2*.1)) + .01*(20 + 22 + 24) = 5.16."""
    cost = Cost(fixed=1.0, weights=0.5, per_sequence=0.1, per_kv_token=0.01)
    assert abs(cost.seconds(3, 2, 20) - 5.16) < 1e-12
    assert abs(cost.seconds(1, 10, 0) - 2.0) < 1e-12
    assert [cost.steps_within(s, 2, 20) for s in (0, 0.1, 1.7, 1.71, 5.16, 5.17)] == [0, 1, 1, 2, 3, 4]


def test_one_wave():
    """Capacity 2, lengths 3, 5, 4: two start, the third at 3, so 5 and 7 end. KV: 2 x 10 + 2 x 3 = 26 at 3, then
    15 + 12 = 27 at 5, then 14."""
    outcome = simulate([group([(3, 1), (5, 1), (4, 0)])], Setting(UNIT, capacity=2), "grpo")
    assert (outcome.seconds, outcome.busy, outcome.generated_tokens, outcome.peak_kv_tokens) == (7, (7,), 12, 27)
    assert outcome.first_wave_s == 7 and outcome.idle_share == 0


def test_padded_cache_and_prefill():
    """One unit per cell: 10 of one prompt's prefill, 2 x 10 for the first step, then 1 x 11 and 1 x 12."""
    cost = Cost(0.0, 0.0, 0.0, 1.0, per_prompt_token=1.0, padded=True)
    assert simulate([group([(1, 1), (3, 1)])], Setting(cost), "grpo").seconds == 10 + 20 + 11 + 12


def test_when_the_second_wave_starts():
    """Failures end at 2 and 4, a success at 9, a failure at 7; tau .5: certain with 3 failures of 4, at 7.

    The second wave takes 6. Beside it another group succeeds until 12. Sequential: 12 + 6. Streamed: 9 + 6. Early:
    7 + 6. Speculative, from the first failure on: 2 + 6, so the other group is the last.
    """
    hard = group([(2, 0), (4, 0), (9, 1), (7, 0)], [(6, 1)] * 4)
    easy = group([(1, 1), (12, 1)])
    seconds = {p: simulate([hard, easy], Setting(UNIT), p).seconds for p in ("grpo", "sequential", "streamed", "early")}
    assert seconds == {"grpo": 12, "sequential": 18, "streamed": 15, "early": 13}
    speculative = simulate([hard, easy], Setting(UNIT), "speculative")
    assert speculative.seconds == 12 and speculative.early == 1 and speculative.wasted_tokens == 0
    assert all(simulate([hard, easy], Setting(UNIT), p).hard == 1 for p in ("sequential", "streamed", "early"))


def test_a_wrong_guess_is_taken_back():
    """A failure at 2 starts 2 sequences; the success at 5 ends the doubt: 2 x 3 tokens for nothing."""
    saved = group([(2, 0), (5, 1)], [(50, 1)] * 2)
    outcome = simulate([saved], Setting(UNIT), "speculative")
    assert (outcome.seconds, outcome.wasted_tokens, outcome.generated_tokens, outcome.hard) == (5, 6, 13, 0)


def test_verdicts_take_time():
    outcome = simulate([group([(2, 0)], [(3, 1)])], Setting(UNIT, grading_s=0.5), "early")
    assert outcome.seconds == 2 + 0.5 + 3 + 0.5 and outcome.first_wave_s == 2


def test_a_shared_queue_uses_the_engine_that_is_free():
    """Two engines of one place. Own queues: group 0 takes 4 + 4 on its own, the other engine 1. Shared: 4 and 4 + 1."""
    groups = [group([(4, 1), (4, 1)]), group([(1, 1)])]
    own = simulate(groups, Setting(UNIT, engines=2, capacity=1), "grpo")
    assert (own.seconds, own.busy, own.idle_share) == (8, (8, 1), 1 - 9 / 16)
    shared = simulate(groups, Setting(UNIT, engines=2, capacity=1, shared_queue=True), "grpo")
    assert (shared.seconds, sum(shared.busy)) == (5, 9)


def test_longest_first():
    """One place: order does not matter. Two places, lengths 1, 1, 2 in three groups: 1 + 2 in turn, else 2."""
    groups = [group([(1, 1)]), group([(1, 1)]), group([(2, 1)])]
    assert simulate(groups, Setting(UNIT, capacity=2), "grpo").seconds == 3
    assert simulate(groups, Setting(UNIT, capacity=2, longest_first=True), "grpo").seconds == 2
