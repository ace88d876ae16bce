r"""Answers that a policy could find to be paid for without being right, or to keep the graders busy."""

import os
import time

import pytest

from lens_megatron.config import ConfigError, from_tree
from lens_megatron.config.rules import machine_mistakes
from lens_megatron.reward import GradeCounts, GraderPool, GradeStatus, grade
from lens_megatron.reward.boxed import excerpt, last_box
from lens_megatron.reward.effort import MAX_NESTING, nesting
from lens_megatron.reward.limits import most_processes
from lens_megatron.reward.math_verify_grader import grade_answer
from lens_megatron.reward.notation import count_items, tidy

CORRECT, WRONG, UNPARSED = GradeStatus.CORRECT, GradeStatus.WRONG, GradeStatus.UNPARSED


@pytest.mark.parametrize(
    ("box", "answer", "status"),
    [
        ("1,1,1", "1", WRONG),
        (r"1 \text{ and } 1", "1", WRONG),
        ("1;1", "1", WRONG),
        (r"\{1,1\}", "1", WRONG),
        ("x=1,x=1", "1", WRONG),
        ("0.5,1/2", "0.5", WRONG),
        ("1", "1,1", WRONG),
        ("1,2,3", "2", WRONG),
        ("1,2,1", "2,1", CORRECT),  # as sets
        (r"3\pm1", "2,4", CORRECT),
        ("2,4", r"3\pm1", CORRECT),
        (r"1 \text{ or } 2", "2,1", CORRECT),
        ("(1,1)", "1", WRONG),
        ("1,234/2", "617", CORRECT),
        ("1,234/2", "117", WRONG),
        (r"\frac{1,234}{2}", "617", CORRECT),
        ("1,234x", "1234x", CORRECT),
        ("(1,234)", "1234", WRONG),
        ("x,100,200", "x,100200", WRONG),
        (r"1\\", "1", CORRECT),
        (r"1\,\\ ", "1", CORRECT),
        ("13/4.", "(13)/(4)", CORRECT),
        (r"2^{2^{2^2}}", "65536", CORRECT),
        (r"9^{9^{9^9}}", "1", WRONG),
        (r"10^{10^{10}}", r"10^{(10^{10})}", CORRECT),
        (r"10^{10^{10}}!", "1", WRONG),
        (r"\sum_{n=1}^{10000000} n!", "1", WRONG),
        ("(" * 100 + "1" + ")" * 100, "1", UNPARSED),
        (r"\left(" * 20 + "1" + r"\right)" * 20, "1", UNPARSED),
        ("{" * 400 + "1" + "}" * 400, "1", UNPARSED),
        ("|" * 40 + "1" + "|" * 40, "1", UNPARSED),
        ("((((((1))))))", "1", CORRECT),
        ("the number of pears is large " * 12, "1", UNPARSED),
        ("1" * 1001, "1", UNPARSED),
    ],
)
def test_what_a_box_is_worth(box: str, answer: str, status: GradeStatus):
    start = time.process_time()
    assert grade_answer(rf"\boxed{{{box}}}", answer).status is status
    assert time.process_time() - start < 10.0


@pytest.mark.parametrize(
    ("completion", "content"),
    [
        (r"\boxed{1}\boxed{2}", "1, 2"),
        (r"so $\boxed{1}$, $\boxed{2}$ and $\boxed{3}$.", "1, 2, 3"),
        (r"\[\boxed{1}\] or \[\boxed{2}\]", "1, 2"),
        (r"\boxed{\boxed{1} \quad \text{and} \quad \boxed{2}}", "1, 2"),
        (r"\boxed{1} or \boxed{1}", "1"),
        (r"\boxed{1} = \boxed{2}", "2"),
        (r"\boxed{1} pears, \boxed{2}", "2"),
        ("\\boxed{1}\n\n\\boxed{2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1}, \boxed{", None),
        (r"\boxed{} \boxed{5}", "5"),
    ],
)
def test_boxes_side_by_side_are_one_answer(completion: str, content: str | None):
    for text in (completion, "first \\boxed{7}, then\n" + completion):
        assert last_box(text)[0] == content == last_box(excerpt(text))[0]


def test_a_chain_of_boxes_is_read_in_time():
    text = r"\boxed{1} " * 200_000
    start = time.process_time()
    assert last_box(excerpt(text))[0] == "1" and len(excerpt(text)) < 3000
    assert time.process_time() - start < 5.0


def test_items_brackets_and_thousands_are_counted_outside_of_each_other():
    assert [count_items(text) for text in ("1", "1,2", "(1,2)", r"\{1,2\}", r"\frac{1,2}{3}, 4", "1,234/2")] == [
        1, 2, 1, 2, 2, 1,
    ]  # fmt: skip
    assert tidy("100,200,x") == "100,200,x" and tidy("1,234,567+x") == "1234567+x"
    assert nesting(r"\left(\frac{\{1\}}{2}\right)") == 3 and nesting("(" * MAX_NESTING) == MAX_NESTING


def test_hostile_answers_are_refused_and_not_waited_for():
    """Without the check, each of these answers takes the whole time limit and costs a worker."""
    hostile = ["(" * depth + "1" + ")" * depth for depth in range(20, 220)]
    hostile += [rf"9^{{9^{{9^{{{n}}}}}}}" for n in range(9, 109)]
    grades = grade([rf"\boxed{{{box}}}" for box in hostile], ["1"] * len(hostile), timeout_s=60.0, workers=2)
    assert GradeCounts.of(grades) == GradeCounts(wrong=100, unparsed=200)


@pytest.mark.parametrize(
    ("workers", "timeout_s", "message"),
    [
        (0, 5.0, "reward.workers_per_rank 0: give at least 1"),
        (100_000, 5.0, "at most"),
        (1, 1e300, "reward.timeout_s 1e.300: give more than 0 and at most 86400"),
        (1, float("nan"), "reward.timeout_s nan"),
        (1, 0.0, "reward.timeout_s 0.0"),
    ],
)
def test_a_pool_has_bounds(workers: int, timeout_s: float, message: str):
    with pytest.raises(ValueError, match=message):
        GraderPool(workers, timeout_s)


def test_one_rule_says_how_many_processes_a_machine_may_grade_with():
    """The trainer's check of the machine and the pool's own agree; every rank may have a process however few cores."""
    cores = os.cpu_count() or 1
    tree = {"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"}}

    def mistake(per_rank: int, ranks: int, cores: int) -> str | None:
        config = from_tree(tree | {"reward": {"workers_per_rank": per_rank}})
        return next(machine_mistakes(config, ranks, cores), None)

    assert (most_processes(2), most_processes(2, ranks=8), most_processes(2, ranks=40)) == (32, 32, 40)
    assert mistake(4, 8, cores=2) is None
    assert mistake(5, 8, cores=2) == (
        "reward.workers_per_rank (5) x 8 ranks on this machine = 40 grading processes, more than 16 for each of its 2 "
        "cores; lower it to 4 or less"
    )
    assert mistake(1, 64, cores=2) is None and "lower it to 1 or less" in str(mistake(2, 64, cores=2))
    too_many = most_processes(cores) + 1
    with pytest.raises(ValueError, match=f"at most {most_processes(cores)} .16 for each of its {cores} cores"):
        GraderPool(too_many, 5.0)
    assert too_many > 256 or mistake(too_many, 1, cores) is not None


@pytest.mark.parametrize("option", [{"timeout_s": 1e300}, {"workers_per_rank": 100_000}])
def test_the_configuration_has_the_same_bounds(option: dict):
    tree = {"run": {"directory": "r"}, "model": {"path": "m"}, "data": {"train": "t"}, "reward": option}
    with pytest.raises(ConfigError, match=f"reward.{next(iter(option))}"):
        from_tree(tree)
