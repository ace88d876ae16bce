"""Extractors: what each reads, what it must not read, and that graders can read the result back."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lens_megatron.reward.boxed import last_box
from lens_megatron.reward.extractors import EXTRACTORS, answer_is, boxed, boxed_or_last_number, gsm8k, in_box
from lens_megatron.reward.extractors import find_extractor as find


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{\frac{3}{8}}.", r"\frac{3}{8}"),
        (r"\boxed{3} and $\boxed{4}$", "3, 4"),
        (r"first \boxed{3}, then \boxed{4", None),
        ("The answer is 5.", None),
    ],
)
def test_boxed(text: str, answer: str | None):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"In 1999 there were \boxed{17} of 40.", "17"),
        ("In all that is $1,234,567.50.", "1234567.50"),
        ("It fell to -7 degrees", "-7"),
        ("It fell to \u22127 degrees", "-7"),
        ("Thus x = 10-3", "3"),  # the minus of a difference is no sign
        ("Thus f(x)-3", "3"),
        ("There is a chance of 3/4.", "3/4"),
        (r"a chance of $\dfrac{3}{4}$.", r"\dfrac{3}{4}"),
        ("which is .25", ".25"),
        ("version 3.5.2", "3.5"),
        ("H2O and x2", None),
        ("1,2345", "2345"),
        ("no number", None),
        ("", None),
        (r"there are 5, so \boxed{", None),  # an open box decides
        (r"there are 5, so \boxed{}", None),
    ],
)
def test_boxed_or_last_number(text: str, answer: str | None):
    assert boxed_or_last_number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 24", "24"),
        ("#### 1,072 clips", "1072"),
        ("####: 55", "55"),
        ("#### $12.50.", "12.50"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### 1,2", "1,2"),  # no thousands: two answers
        ("#### 5\n\nQuestion: ...\n#### 6", "6"),
        ("#### 5\n#### six", None),
        ("#### \n5", None),
        ("### 5", None),
        ("the answer is 5", None),
    ],
)
def test_gsm8k(text: str, answer: str | None):
    assert gsm8k(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("The answer is 3.14. It is close to pi.", "3.14"),
        ("Therefore the answer is: 42", "42"),
        ("**Answer:** 42", "42"),
        ("ANSWER: B", "B"),
        ("**Final Answer:**\n\n\\(x = 3\\)", "x = 3"),
        ("The answers are $x=1$, $x=2$ and $x = 3$ as shown.", "x=1, x=2, x = 3"),
        ("The answer is $5$ because $2+3=5$.", "5"),
        (r"The answer is \[\boxed{7}\]", "7"),
        (r"The answer is \boxed{7}, as expected.", "7"),
        (r"The answer is $\boxed{7}$ or $\boxed{8}$.", "7, 8"),
        ("The answer is 5. Wait: the answer is 6.", "6"),
        ("The answer is 12 square metres\nDone.", "12 square metres"),
        ("The answer is \\frac{1}{2", None),  # no grader could read it
        ("We answered 5.", None),
        ("The answer island is 5.", None),
        ("The answer is ", None),
        ("It is 5.", None),
    ],
)
def test_answer_is(text: str, answer: str | None):
    assert answer_is(text) == answer


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="answer is:#$\\boxed{}0123456789-,./\n ()[]"), st.sampled_from(sorted(EXTRACTORS)))
@example("the answer is {5}}", "answer_is")
@example("the answer is 5\\", "answer_is")
@example("the answer is " + "5" * 1500, "answer_is")
@example("#### " + "5" * 1500, "gsm8k")
def test_a_grader_reads_back_what_was_extracted(text: str, name: str):
    answer = find(name)(text)
    assert answer is None or last_box(in_box(answer)) == (answer, "")


@pytest.mark.parametrize("name", sorted(EXTRACTORS))
@pytest.mark.parametrize(
    "piece", ["answer is ", "answer" + " " * 50, "1", "1,", "#", "#### ", "$", "$$x", "-", "\\(", "{"]
)
def test_long_texts_are_read_in_time(name: str, piece: str):
    start = time.process_time()
    find(name)(piece * (400_000 // len(piece)))
    assert time.process_time() - start < 5.0


def test_extractors_are_found_by_name():
    assert find("gsm8k") is gsm8k and set(EXTRACTORS) == {"boxed", "boxed_or_last_number", "gsm8k", "answer_is"}
    with pytest.raises(ValueError, match="unknown extractor 'gsm8'; did you mean gsm8k.; known: boxed, boxed_or_last"):
        find("gsm8")
