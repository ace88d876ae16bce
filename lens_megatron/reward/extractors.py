r"""Extractors find the answer in a completion; a protocol of evaluation names one of them.

Training reads boxes only (`boxed`): the prompt asks for one, and a looser reading pays a policy for text that happens
to hold the right number. Models that were never asked for a box, and protocols of other projects, need the others.

Whatever an extractor returns can be graded as it is: `in_box` makes a completion of it, from which every grader reads
exactly that text back. Extractors are pure, use the standard library only and take time linear in the length of the
text.
"""

import difflib
import re
from collections import deque
from collections.abc import Callable, Mapping

from lens_megatron.reward.boxed import last_box

Extractor = Callable[[str], str | None]
"""Takes a completion; returns its answer as LaTeX or text without outer white space, or None where it gives none."""

_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_MARK = re.compile(r"####:?[ \t]{0,10}([-+\u2212]?)\$?([0-9][0-9.,]*)")
_NUMBER = re.compile(
    r"((?<![\w.)\]}])[-\u2212])?(?:\\?\$)?(?<![\w.])"  # a minus after a number or a bracket is no sign
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+|\\[dt]?frac\{[0-9]+\}\{[0-9]+\})"
)
_PHRASE = re.compile(r"(?<![a-zA-Z])answers?\**\s{0,5}(?:is|are|:)(?![a-zA-Z])\s{0,5}:?\**\s{0,5}", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$(.{1,1000}?)\$\$|\$([^$]{1,1000})\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.DOTALL)
_SEPARATOR = re.compile(r"\s{0,5}[,;]?\s{0,5}(?:(?:and|or)(?![a-zA-Z])\s{0,5})?")
_SENTENCE = re.compile(r"(?:[^\n.]|\.(?!\s|$))*")
_MAX_SENTENCE = 2_000
_BEFORE, _AFTER = " \t\r\n*,;:", " \t\r\n*.,;:!"


def boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, as `reward.boxed.last_box` reads it.

    Example: `So \boxed{\frac{1}{2}}.` gives `\frac{1}{2}`; `\boxed{1} and \boxed{2}` gives `1, 2`.
    """
    return last_box(text)[0]


def boxed_or_last_number(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, and where there is no box at all the last number.

    A box that is empty, not closed or too long gives None, as in training: the numbers before it are no answer. A
    number may have a sign, thousands separators (which are removed), decimals and a whole denominator, as in `-1,234.5`
    and `3/4`, or be a `\frac` of two whole numbers. The last number is often not the answer (a year, a step's number);
    lm-evaluation-harness' `flexible-extract` and Qwen2.5-Math's evaluation read it all the same.

    Example: `That is $1,200 in all.` gives `1200`.
    """
    if "\\boxed" in text:
        return boxed(text)
    last = _last(_NUMBER, text)
    return None if last is None else _gradable(("-" if last[1] else "") + last[2].replace(",", ""))


def gsm8k(text: str) -> str | None:
    """Returns the number after the last `####`, which ends the solutions of GSM8K, without thousands separators.

    As in the graders of GSM8K, the number stands on the line of the mark, perhaps after a dollar sign; what follows it
    is dropped. The last mark decides even if no number follows it. Source: openai/grade-school-math, `dataset.py`,
    which takes the first mark; verl and we take the last, because a model may quote an example first.

    Example: `#### 1,072 clips` gives `1072`.
    """
    start = text.rfind("####")
    match = _MARK.match(text, start) if start >= 0 else None
    if match is None:
        return None
    digits = _GROUPED.sub(lambda group: group[0].replace(",", ""), match[2].rstrip(".,"))
    return _gradable(("-" if match[1] in ("-", "\u2212") else "") + digits)


def answer_is(text: str) -> str | None:
    r"""Returns what follows the last "answer is", "answers are" or "answer:", in capitals or not.

    That is a box or a formula, or several with only commas, `and` or `or` between them; otherwise the rest of the
    sentence, up to a full stop before white space or the end of the line. Source: the prompt of Minerva (arXiv
    2206.14858: "The final answer is $24$. I hope it is correct.") and that of OpenAI's simple-evals
    ("Answer: ...").

    Example: `The final answer is $\frac{1}{2}$. I hope it is correct.` gives `\frac{1}{2}`.
    """
    phrase = _last(_PHRASE, text)
    if phrase is None:
        return None
    rest = text[phrase.end() : phrase.end() + _MAX_SENTENCE]
    formulas, end = [], 0
    while match := _FORMULA.match(rest, end):
        formulas.append(next(part for part in match.groups() if part is not None).rstrip(_AFTER))
        separator = _SEPARATOR.match(rest, match.end())
        end = separator.end() if separator else match.end()
    if formulas:
        return _gradable(", ".join(formulas))
    sentence = _SENTENCE.match(rest)
    return _gradable(sentence[0]) if sentence else None


EXTRACTORS: Mapping[str, Extractor] = {
    "boxed": boxed,
    "boxed_or_last_number": boxed_or_last_number,
    "gsm8k": gsm8k,
    "answer_is": answer_is,
}


def find_extractor(name: str) -> Extractor:
    """Returns the extractor of that name. Raises ValueError for an unknown one, with the names that there are."""
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    near = difflib.get_close_matches(name, EXTRACTORS, n=1)
    raise ValueError(
        f"unknown extractor {name!r}{f'; did you mean {near[0]}?' if near else ''}; known: {', '.join(EXTRACTORS)}"
    )


def in_box(answer: str) -> str:
    r"""Returns a completion that gives this answer, for graders that read boxes: `72` becomes `\boxed{72}`."""
    return rf"\boxed{{{answer}}}"


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _gradable(answer: str) -> str | None:
    """Returns the answer if a grader can read it back from a box as it is; None for text that it could not."""
    answer = answer.lstrip(_BEFORE).rstrip(_AFTER)
    if "\\boxed" in answer:
        return last_box(answer)[0]
    return answer if answer and last_box(in_box(answer))[0] == answer else None
