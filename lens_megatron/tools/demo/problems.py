"""Generates arithmetic word problems with distractors: (seed, split, noise shares) -> a stream of `Problem`.

Every problem is decided by a random generator alone, so a seed gives the same problems everywhere. The two splits never
share a core (template and numbers): a checksum of the core says which split it belongs to.
"""

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lens_megatron.tools.demo.templates import CLAUSES, NAMES, OBJECTS, SHORTS, TEMPLATES

KIND_SHARES = {"add": 8, "sub": 8, "mul": 6, "add_sub": 2, "sub_add": 1, "mul_add": 1, "mul_sub": 1}
SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}
EVAL_ONE_IN = 6
"""One core in this many belongs to the evaluation split."""
SPOT = "\0"
"""Marks a place inside a sentence where a short distractor may go; never left in a problem."""
BEGIN, END = "\1", "\2"
"""Mark the ends of a distractor while a problem is made; never left in it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One word problem.

    Example: kind "sub", noise 1, core "Tom has 9 nuts. Tom lost 4 of them. How many ...?",
    solution "9-4=5. \\boxed{5}", problem "Tom has 9 nuts (see page 7). Tom lost 4 of them. How many ...?", answer "5".
    """

    problem: str
    """The text shown to the model."""
    core: str
    """The same text without its distractors."""
    kind: str
    """Operations in order, joined by "_": a key of `TEMPLATES`."""
    template: int
    """Index within `TEMPLATES[kind]`."""
    numbers: tuple[int, ...]
    """Operands in the order of the operations."""
    noise: int
    """Number of distractors."""
    solution: str
    """An example of a good completion; the warm-up trains on it."""
    answer: str
    stray_numbers: tuple[int, ...]
    """Numbers that only distractors brought in."""
    noise_spans: tuple[tuple[int, int], ...]
    """The characters [start, end) of `problem` that its distractors are, one span each, ascending."""


def stream(split: str, seed: int, noise_shares: dict[int, float]) -> Iterator[Problem]:
    """Yields endless distinct problems of `split` (train or eval); `noise_shares`: number of distractors -> weight."""
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while True:
        kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
        template = rng.randrange(len(TEMPLATES[kind]))
        numbers = _numbers(kind, rng)
        if split_of(kind, template, numbers) != split:
            continue
        noise = rng.choices(list(noise_shares), list(noise_shares.values()))[0]
        problem = _problem(kind, template, numbers, noise, rng)
        if problem.problem not in seen:
            seen.add(problem.problem)
            yield problem


def split_of(kind: str, template: int, numbers: tuple[int, ...]) -> str:
    """Returns the split that owns this core."""
    return "eval" if zlib.crc32(f"{kind}/{template}/{numbers}".encode()) % EVAL_ONE_IN == 0 else "train"


def write_jsonl(path: Path, problems: Iterator[Problem], count: int) -> None:
    """Writes the first `count` problems as JSON lines `{"id", "problem", "answer", "noise", "kind", "core"}`.

    `noise` is the list of spans [start, end) that are distractors, for `data.noise_key`.
    """
    with path.open("w", encoding="utf-8") as file:
        for i, p in enumerate(islice(problems, count)):
            row = {"id": f"{path.stem}-{i}", "problem": p.problem, "answer": p.answer,
                   "noise": p.noise_spans, "kind": p.kind, "core": p.core}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def _numbers(kind: str, rng: random.Random) -> tuple[int, ...]:
    """Draws operands that are small enough for every intermediate result to lie in 1..99."""
    first, *rest = kind.split("_")
    if first == "add":
        numbers = [rng.randint(2, 12), rng.randint(2, 12)]
    elif first == "sub":
        numbers = [rng.randint(4, 18)]
        numbers.append(rng.randint(2, min(9, numbers[0] - 1)))
    else:
        numbers = [rng.randint(2, 6), rng.randint(2, 6)]
    value = _apply(first, *numbers)
    for op in rest:
        numbers.append(rng.randint(2, 6) if op == "add" else rng.randint(1, min(6, value - 1)))
        value = _apply(op, value, numbers[-1])
    return tuple(numbers)


def _apply(op: str, x: int, y: int) -> int:
    return {"add": x + y, "sub": x - y, "mul": x * y}[op]


def _solve(kind: str, numbers: tuple[int, ...]) -> tuple[str, str]:
    """Returns the worked solution and the answer: ("mul_sub", (3, 4, 2)) -> ("3*4=12. 12-2=10. \\boxed{10}", "10")."""
    value, steps = numbers[0], []
    for op, number in zip(kind.split("_"), numbers[1:], strict=True):
        result = _apply(op, value, number)
        steps.append(f"{value}{SYMBOLS[op]}{number}={result}.")
        value = result
    return " ".join([*steps, f"\\boxed{{{value}}}"]), str(value)


def _problem(kind: str, template: int, numbers: tuple[int, ...], noise: int, rng: random.Random) -> Problem:
    name, other, third = rng.sample(NAMES, 3)
    obj = rng.choice(OBJECTS)
    words = dict(zip("abc", map(str, numbers), strict=False)) | {"other": other + SPOT}
    words |= {"name": name + SPOT, "obj": obj + SPOT}
    sentences = [s.format(**words) for s in TEMPLATES[kind][template]]
    # The question itself stays clean: a distractor there would often read as part of what is asked.
    sentences[-1] = sentences[-1].replace(SPOT, "")
    core = " ".join(sentences).replace(SPOT, "")
    clauses, stray = rng.sample(CLAUSES, noise), []
    for clause in clauses:
        n = rng.randint(2, 20)
        if rng.random() < 0.5 or not any(SPOT in sentence for sentence in sentences):
            text = clause.format(name=name, third=third, obj=obj, n=n)
            sentences.insert(rng.randrange(len(sentences)), f"{BEGIN}{text}{END}")
        else:
            text = rng.choice(SHORTS).format(n=n)
            _insert_short(sentences, f"{BEGIN}{text}{END}", rng)
        stray += [n] * (str(n) in text)
    solution, answer = _solve(kind, numbers)
    text, spans = _without_marks(" ".join(sentences).replace(SPOT, ""))
    return Problem(
        problem=text,
        core=core,
        kind=kind,
        template=template,
        numbers=numbers,
        noise=noise,
        solution=solution,
        answer=answer,
        stray_numbers=tuple(stray),
        noise_spans=spans,
    )


def _without_marks(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the text without BEGIN and END, and the spans between them: "a\\1 b\\2." -> ("a b.", ((1, 3),))."""
    parts = [part.partition(END) for part in marked.split(BEGIN)[1:]]
    text, spans = marked.split(BEGIN)[0], []
    for noise, _, rest in parts:
        spans.append((len(text), len(text) + len(noise)))
        text += noise + rest
    return text, tuple(spans)


def distracted_solution(problem: Problem, rng: random.Random) -> str:
    """A worked solution that takes a distractor's number for one of the operands; the right one where there is none."""
    if not problem.stray_numbers:
        return problem.solution
    numbers = list(problem.numbers)
    numbers[rng.randrange(len(numbers))] = rng.choice(problem.stray_numbers)
    return _solve(problem.kind, tuple(numbers))[0]


def _insert_short(sentences: list[str], text: str, rng: random.Random) -> None:
    """Puts `text` at one of the marked spots, which cannot be used again."""
    spots = [(i, j) for i, s in enumerate(sentences) for j, char in enumerate(s) if char == SPOT]
    i, j = rng.choice(spots)
    sentences[i] = sentences[i][:j] + text + sentences[i][j + 1 :]
