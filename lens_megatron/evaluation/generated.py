r"""Generates problems that no model has seen: (seed, count) -> problems with exact answers.

A model that knows a benchmark by heart does not know these, once the user has chosen a seed. They are a yardstick
beside the benchmarks, not a rank among models: twelve kinds at three levels, of the matter of MATH's easier half. Every
problem is a function of the seed and its place alone, answers come from integer and rational arithmetic, and no two
problems of a set have the same text.
"""

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb, factorial, gcd, lcm, perm

from lens_megatron.evaluation.benchmarks import EvalProblem

NAME = "generated"
LEVELS = (1, 2, 3)

Drawn = tuple[str, str]
"""A problem's text and its answer."""


def generate(seed: int, count: int) -> tuple[EvalProblem, ...]:
    """Returns `count` different problems; the first ones are the same for every larger count."""
    return tuple(problem for problem, _ in zip(_stream(seed), range(count), strict=False))


def _stream(seed: int) -> Iterator[EvalProblem]:
    seen: set[str] = set()
    cells = [(subject, kind, level) for level in LEVELS for subject, kind in KINDS]
    place = 0
    while True:
        order = list(cells)
        random.Random(f"generated-{seed}-{place // len(cells)}").shuffle(order)  # any count has every kind alike
        for subject, kind, level in order:
            yield _fresh(seed, place, subject, kind, level, seen)
            place += 1


def _fresh(
    seed: int, place: int, subject: str, kind: Callable[[random.Random, int], Drawn], level: int, seen: set[str]
) -> EvalProblem:
    rng = random.Random(f"generated-{seed}-{place}-problem")
    text, answer = kind(rng, level)
    while text in seen:
        text, answer = kind(rng, level)
    seen.add(text)
    return EvalProblem(NAME, f"{seed}/{place}", place, text, answer, subject, str(level), "")


def _latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" * (value < 0)
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _sum(*terms: tuple[int, str]) -> str:
    """Writes a sum as people do: `_sum((1, "x^2"), (0, "x"), (-3, ""))` is `x^2 - 3`."""
    text = ""
    for number, symbol in terms:
        if number:
            size = str(abs(number)) if abs(number) > 1 or not symbol else ""
            sign = (" - " if number < 0 else " + ") if text else "-" * (number < 0)
            text += f"{sign}{size}{symbol}"
    return text or "0"


def _size(level: int, sizes: tuple[int, int, int]) -> int:
    return sizes[level - 1]


def _linear(rng: random.Random, level: int) -> Drawn:
    bound = _size(level, (9, 30, 99))
    a, c = rng.sample(range(2, bound), 2)
    b, d = rng.randint(-bound, bound), rng.randint(-bound, bound)
    root = Fraction(d - b, a - c)
    return f"Solve for $x$: ${_sum((a, 'x'), (b, ''))} = {_sum((c, 'x'), (d, ''))}$. Give an exact value.", _latex(root)


def _root_sums(rng: random.Random, level: int) -> Drawn:
    a, b = rng.randint(1, 4 * level), rng.randint(-9 * level, 9 * level)
    c = rng.randint(1, 9 * level) * rng.choice((-1, 1))
    total, product = Fraction(-b, a), Fraction(c, a)
    polynomial = _sum((a, "x^2"), (b, "x"), (c, ""))
    if level == 1:
        return f"What is the sum of the two complex roots of ${polynomial}$?", _latex(total)
    if level == 2:
        what = "the sum of the squares of the two complex roots"
        return f"What is {what} of ${polynomial}$?", _latex(total**2 - 2 * product)
    what = "the sum of the cubes of the two complex roots"
    return f"What is {what} of ${polynomial}$?", _latex(total**3 - 3 * total * product)


def _system(rng: random.Random, level: int) -> Drawn:
    bound = _size(level, (5, 12, 40))
    x, y = rng.randint(-bound, bound), rng.randint(-bound, bound)
    a, b, c, d = (rng.choice((-1, 1)) * rng.randint(1, bound) for _ in range(4))
    while a * d == b * c:
        d += 1 + (d == -1)
    first = f"{_sum((a, 'x'), (b, 'y'))} = {a * x + b * y}"
    second = f"{_sum((c, 'x'), (d, 'y'))} = {c * x + d * y}"
    return f"The numbers $x$ and $y$ satisfy ${first}$ and ${second}$. Find $x - y$.", str(x - y)


def _remainder(rng: random.Random, level: int) -> Drawn:
    modulus, base = rng.randint(5, _size(level, (13, 60, 400))), rng.randint(2, _size(level, (9, 40, 200)))
    exponent = rng.randint(3, _size(level, (12, 200, 5000)))
    answer = str(pow(base, exponent, modulus))
    return f"What is the remainder when ${base}^{{{exponent}}}$ is divided by ${modulus}$?", answer


def _divisors(rng: random.Random, level: int) -> Drawn:
    primes = rng.sample((2, 3, 5, 7, 11, 13), level + 1)
    exponents = [rng.randint(1, 3) for _ in primes]
    number, count = 1, 1
    for prime, exponent in zip(primes, exponents, strict=True):
        number, count = number * prime**exponent, count * (exponent + 1)
    return f"How many positive divisors does ${number}$ have?", str(count)


def _multiples(rng: random.Random, level: int) -> Drawn:
    a, b = rng.sample(range(3, _size(level, (9, 15, 30))), 2)
    top = rng.randint(60, _size(level, (200, 1000, 9000)))
    if level == 1:
        return f"What is the least common multiple of ${6 * a}$ and ${6 * b}$?", str(lcm(6 * a, 6 * b))
    either = top // a + top // b - top // lcm(a, b)
    if level == 2:
        return f"How many positive integers not exceeding ${top}$ are divisible by ${a}$ or ${b}$?", str(either)
    exactly = either - top // lcm(a, b)
    what = f"are divisible by exactly one of ${a}$ and ${b}$"
    return f"How many positive integers not exceeding ${top}$ {what}?", str(exactly)


def _paths(rng: random.Random, level: int) -> Drawn:
    x, y = rng.randint(2, _size(level, (5, 8, 10))), rng.randint(2, _size(level, (5, 8, 10)))
    text = f"A path from $(0,0)$ to $({x},{y})$ takes unit steps to the right or up."
    if level < 3:
        return f"{text} How many such paths are there?", str(comb(x + y, x))
    i, j = rng.randint(1, x - 1), rng.randint(1, y - 1)
    through = comb(i + j, i) * comb(x + y - i - j, x - i)
    return f"{text} How many such paths do not visit $({i},{j})$?", str(comb(x + y, x) - through)


def _words(rng: random.Random, level: int) -> Drawn:
    pool = "ABCDEFGH"[: level + 1]
    counts = [rng.randint(1, 3 + (level > 1)) for _ in pool]
    letters = "".join(letter * count for letter, count in zip(pool, counts, strict=True))
    ways = factorial(len(letters))
    for count in counts:
        ways //= factorial(count)
    shuffled = "".join(rng.sample(letters, len(letters)))
    return f"How many different arrangements of all the letters of {shuffled} are there?", str(ways)


def _balls(rng: random.Random, level: int) -> Drawn:
    red, blue = rng.randint(2, 20 + 5 * level), rng.randint(2, 20 + 5 * level)
    drawn = min(level + 1, red, blue)
    chance = Fraction(perm(red, drawn), perm(red + blue, drawn))
    text = f"A bag holds ${red}$ red and ${blue}$ blue balls. ${drawn}$ balls are drawn at random without replacement."
    if level == 1:
        return f"{text} What is the probability that all of them are red? Give a common fraction.", _latex(chance)
    what = "at least one of them is blue"
    return f"{text} What is the probability that {what}? Give a common fraction.", _latex(1 - chance)


def _dice(rng: random.Random, level: int) -> Drawn:
    dice, sides = level + 1, rng.randint(4, 30)
    total = rng.randint(dice + 1, dice * sides - 1)
    ways = {0: 1}
    for _ in range(dice):
        rolled: dict[int, int] = {}
        for value, count in ways.items():
            for face in range(1, sides + 1):
                rolled[value + face] = rolled.get(value + face, 0) + count
        ways = rolled
    text = f"${dice}$ fair dice, each with faces numbered $1$ to ${sides}$, are rolled."
    what = f"What is the probability that the sum is ${total}$? Give a common fraction."
    return f"{text} {what}", _latex(Fraction(ways[total], sides**dice))


def _triangle(rng: random.Random, level: int) -> Drawn:
    bound = _size(level, (6, 15, 60))
    points = [(rng.randint(-bound, bound), rng.randint(-bound, bound)) for _ in range(3)]
    (ax, ay), (bx, by), (cx, cy) = points
    double = abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay))
    if not double:
        return _triangle(rng, level)
    where = ", ".join(f"$({x},{y})$" for x, y in points)
    if level < 3:
        area = _latex(Fraction(double, 2))
        return f"What is the area of the triangle with vertices {where}? Give an exact value.", area
    sides = zip(points, [*points[1:], points[0]], strict=True)
    border = sum(gcd(qx - px, qy - py) for (px, py), (qx, qy) in sides)
    inside = (double - border + 2) // 2  # Pick's theorem
    what = "points with integer coordinates lie strictly inside"
    return f"How many {what} the triangle with vertices {where}?", str(inside)


def _series(rng: random.Random, level: int) -> Drawn:
    first, step, count = rng.randint(1, 20 * level), rng.randint(2, 9 * level), rng.randint(5, 20 * level)
    if level < 3:
        arithmetic = count * (2 * first + (count - 1) * step) // 2
        what = f"first term ${first}$ and common difference ${step}$"
        return f"What is the sum of the first ${count}$ terms of the arithmetic sequence with {what}?", str(arithmetic)
    ratio = Fraction(rng.choice((1, 2, 3)), rng.choice((4, 5, 7)))
    what = f"first term ${first}$ and common ratio ${_latex(ratio)}$"
    total = first / (1 - ratio)
    return f"What is the sum of the infinite geometric series with {what}? Give an exact value.", _latex(total)


KINDS: tuple[tuple[str, Callable[[random.Random, int], Drawn]], ...] = (
    ("algebra", _linear),
    ("algebra", _root_sums),
    ("algebra", _system),
    ("number theory", _remainder),
    ("number theory", _divisors),
    ("number theory", _multiples),
    ("counting", _paths),
    ("counting", _words),
    ("probability", _balls),
    ("probability", _dice),
    ("geometry", _triangle),
    ("sequences", _series),
)
"""Subjects with the functions that draw a problem of a level."""
