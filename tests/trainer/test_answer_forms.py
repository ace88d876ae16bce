r"""Notation of answers: each rule with answers that it must accept and answers that it must refuse."""

import pytest

from lens_megatron.reward.forms import compare_forms
from lens_megatron.reward.math_verify_grader import grade_answer
from lens_megatron.reward.notation import letters_in_both_cases, mark_capitals, readings, tidy
from lens_megatron.reward.units import Quantity, split_unit

RIGHT = {
    "units": [("7.5cm^{2}", "7.5"), ("30 $m$", r"30 \text{ m}"), ("9", r"9\,\mathrm{m/s^2}")],
    "letters are variables": [(r"\frac{1}{m} t", r"\frac{t}{m}"), (r"\pi r^2 h", r"h \pi r^2"), ("2ab", "2ba")],
    "magnitudes": [(r"3 \text{ million}", "3000000"), ("4500", "4.5 thousand"), ("2 billion", r"2 \times 10^9")],
    "capitals": [(r"\frac{R}{r}", r"R \cdot \frac{1}{r}"), ("R+r", "r+R"), ("2A", "2a")],
    "tiny numbers": [(r"2.5 \times 10^{-9}", "2.5e-9"), ("0.0004", r"4 \times 10^{-4}"), ("10^{-7}", "0.0000001")],
    "imaginary unit": [(r"\frac{1}{1-i}", r"\frac{1+i}{2}"), ("4+5i", r"4+5\mathrm{i}"), ("i^3", "-i")],
    "braced commas": [("0.75", "0{,}75"), (r"\frac{25000}{7}", r"\frac{25{,}000}{7}"), ("12000x", r"12{,}000x")],
    "decimal commas": [("2.5", "2,5"), ("17.25", "17,25"), ("0.125", "0,125")],
    "choices": [("B", r"\textbf{(B) } 7"), ("C", "C) 12"), (r"\text{(D)}", r"\text{D. none}"), ("E", "(E)")],
    "times": [("3:07 pm", "3:07"), ("3:07 pm", r"03:07\text{ p.m.}"), ("9am", "9:00 AM")],
    "words": [("Quadrant II", r"\text{quadrant II}"), (r"\text{parabola}", "a parabola"), ("Ann", r"\textbf{Ann}.")],
    "bases": [("31_7", "31_{7}"), ("31_{7}", "31"), ("1011_2", "1011_2")],
    "sets and inequalities": [(r"\{x|1<x\leq 4\}", "(1,4]"), ("[3,\\infty)", r"x \ge 3"), ("a > b > c", "a>b>c")],
    "several formulas": [("$3$ or $-3$", "-3, 3"), ("$1$, $2$ and $5$", "5,1,2"), ("$4$,$7$", r"4 \text{ and } 7")],
    "symbols": [("2\\sqrt{5}", "2\u221a5"), ("\\frac{\\pi}{3}", "\u03c0/3"), ("x^2", "x\u00b2"), ("\\frac12", "½")],
    "percentages": [("2.5\\%", "2.5"), ("2.5\\%", "0.025"), ("40%", r"\frac{2}{5}")],
    "subscripts": [("E_{1}+E_{2}", "E_2+E_1"), (r"v_{\max}/2", r"\frac{v_{\text{max}}}{2}"), ("3E_0", "3E_{0}")],
    "binomials": [("C_{9}^{4}", r"\binom{9}{4}"), ("C_{9}^{4}", "126"), (r"\binom{6}{2}", "C_6^2")],
}  # fmt: skip
WRONG = {
    "units": [("7.5cm^{2}", "75"), ("12", r"12 \text{ or } 13"), ("2ab", "2"), (r"\pi r^2 h", r"\pi r^2")],
    "magnitudes": [(r"3 \text{ million}", "3"), ("3", r"3 \text{ hundred}"), ("5000", r"5 \text{ million}")],
    "capitals": [(r"\frac{R}{r}", "1"), (r"\frac{R}{r}", r"\frac{r}{R}"), ("R+r", "2r"), ("2r", "R+r")],
    "tiny numbers": [
        (r"2.5 \times 10^{-9}", "0"),
        (r"1.3 \times 10^{-27}", r"1.4 \times 10^{-27}"),
        ("0.0004", "0.00041"),
    ],
    "imaginary unit": [(r"\frac{1}{1-i}", r"\frac{1-i}{2}"), ("i^3", "i"), ("4+5i", "4-5i")],
    "decimal commas": [("1,2", "1.2"), ("2", "2,5"), ("1500.5", "1,500"), ("2.5", "2,6")],
    "choices": [("A", "B) A"), ("A", "A) 3 B) 4"), ("C", "(A)")],
    "times": [("3:07 pm", r"\frac{3}{7}"), ("3:07 pm", "3:07 am"), ("9am", "9:30")],
    "words": [(r"\text{even}", r"\text{uneven}"), ("Quadrant II", "Quadrant III"), (r"\text{Ann}", r"\text{Anne}")],
    "bases": [("31_7", "31_8"), ("31_7", "13_7"), ("31_7", "22")],
    "sets and inequalities": [(r"\{x|1<x\leq 4\}", "(1,4)"), ("a > b > c", "a<b<c"), ("[3,\\infty)", "x > 3")],
    "several formulas": [("$3$ or $-3$", "3"), ("$4$,$7$", "4"), ("$1$, $2$ and $5$", "1,2,4")],
    "delimiters": [("9", r"1 \(2\) \(9\)"), ("9", r"not \( 9 \)"), ("9", r"\[3\] \[9\]")],
    "percentages": [("2.5\\%", "25"), ("40%", r"\frac{1}{5}"), ("2.5\\%", "0.25")],
    "binomials": [("C_{9}^{4}", r"\binom{9}{3}"), ("C_{1}^{2}", r"\binom{2}{1}"), ("C_{9}^{4}", "9^4")],
}


def cases(table: dict[str, list[tuple[str, str]]]) -> list:
    return [pytest.param(*pair, id=f"{rule}: {pair[1]}") for rule, pairs in table.items() for pair in pairs]


@pytest.mark.parametrize(("gold", "box"), cases(RIGHT))
def test_equal_answers_in_other_notation(gold: str, box: str):
    assert grade_answer(rf"\boxed{{{box}}}", gold).score == 1


@pytest.mark.parametrize(("gold", "box"), cases(WRONG))
def test_other_answers_in_similar_notation(gold: str, box: str):
    assert grade_answer(rf"\boxed{{{box}}}", gold).score == 0


def test_units_are_split_off_only_behind_values():
    assert split_unit(r"5 \mathrm{~km} / \mathrm{s}".replace("~", " ")) == Quantity("5", True)
    assert split_unit("6m") == Quantity("6", False) and readings("6m") == ("6", "6m")
    for kept in (r"\text{cm}", "cm", "2 xcm", r"x^{\text{th}}", r"6 \text{ percent}", "a m"):
        assert split_unit(kept) == Quantity(kept, True)


def test_capitals_are_marked_where_both_cases_occur():
    assert letters_in_both_cases(r"\frac{R}{r}") == {"R"} and not letters_in_both_cases(r"\Rho r \text{R} S")
    assert mark_capitals(r"R_1 + r", frozenset("R")) == r"\variable{capitalR1} + r"
    assert tidy(r"6 \text{ million dollars}") == r"6 \times 10^{6}"


def test_forms_that_do_not_apply_decide_nothing():
    assert [compare_forms(box, gold) for box, gold in (("5", "6"), ("A", "A"), ("odd", "even"), ("1,500", "1.5"))] == [
        None, None, None, None,
    ]  # fmt: skip
