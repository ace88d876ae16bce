"""Lists the cases of a day on a GPU, the worthiest first: what each answers, how it is run, how long it may take.

In commands, {python} is the interpreter, {result} the case's own folder of results, {scratch} a folder that lasts as
long as the machine, and {budget} the seconds after which the command should begin nothing more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.operators.shapes import LINEAR, LOGITS

CALL_S = 9.5 * 60
"""The seconds of one call; a case that could take longer would never end."""
ENDING_S = 30.0
"""What a command keeps of its limit, for the case that is under way when its budget is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question to the machine."""

    name: str
    answers: str
    """What is known once it has run."""
    command: tuple[str, ...]
    reader: str
    """The name of the function of reading.py that says what was found."""
    expected_s: float
    """It is not begun in a call that has less time left."""
    limit_s: float
    """It is ended after this time."""
    needs_device: bool = True
    tool: str = ""
    """A program that must be on PATH; empty: none."""
    environment: tuple[tuple[str, str], ...] = ()
    rehearsal: tuple[str, ...] = ()
    """The command that runs the same code at a tiny size without a GPU; empty: there is none."""
    rehearsal_environment: tuple[tuple[str, str], ...] = ()
    without_rehearsal: str = ""
    """Why there is none."""


def filled(command: Sequence[str], places: Mapping[str, object]) -> list[str]:
    """Returns `command` with the places' values in it; other braces stay as they are."""
    words = list(command)
    for name, value in places.items():
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    return words


def plan(root: Path) -> tuple[Case, ...]:
    """Returns all cases in order of worth; files of tests are those in `root`/tests/kernels."""
    files = _kernel_tests(root)
    linear, logits = list(_operators("linear", LINEAR["standard"])), list(_operators("logits", LOGITS["standard"]))
    return (
        MACHINE,
        *(_tests(name) for name in files[:4]),
        linear[0],
        logits[0],
        *_questions(),
        _tests("tests/trainer/test_gpu.py", without_rehearsal="the cases of the trainer and of LENS run its code"),
        _trainer("qwen2.5-1.5b", expected_s=240),
        _lens("random-1.5b", "ten steps of LENS, with the embedded engine, on a model of 1.5B parameters", 180),
        *_in_turn(linear[1:], logits[1:]),
        *(_tests(name) for name in files[4:]),
        _sanitizer("memcheck", "tests/kernels/test_logprobs.py", "whether a kernel reads or writes out of bounds"),
        _sanitizer("racecheck", "tests/kernels/test_backends.py", "whether the packed gradient races with its input"),
        _trainer("qwen2.5-3b", expected_s=300),
        _lens("demo", "whether the demo can be made and trained without a network", 240),
        COMPILED,
    )


MACHINE = Case(
    name="machine",
    answers="which machine this is, and whether every module of the trainer can be imported there",
    command=("{python}", "-m", "benchmarks.gpu_session.machine", "{result}"),
    rehearsal=("{python}", "-m", "benchmarks.gpu_session.machine", "{result}"),
    reader="json",
    expected_s=20,
    limit_s=120,
    needs_device=False,
)
COMPILED = Case(
    name="compiled kernels",
    answers="registers, spills and access widths of the kernels, as this Triton compiles them for A100, H100, B200",
    command=("{python}", "tests/kernels/compiled_kernels.py", "--json"),
    rehearsal=("{python}", "tests/kernels/compiled_kernels.py", "--json"),
    reader="compiled",
    expected_s=60,
    limit_s=300,
    needs_device=False,
)
FIRST_TESTS = ("test_gpu", "test_linear", "test_logprobs", "test_policy_loss")
"""CUDA graphs and 2^31 elements, then the operators that matter most. The other files come later."""


def _kernel_tests(root: Path) -> list[str]:
    """Returns the files of tests that may hold tests for a GPU, the worthiest first."""
    stems = sorted(path.stem for path in root.glob("tests/kernels/test_*.py"))
    first = [stem for stem in FIRST_TESTS if stem in stems]
    return [f"tests/kernels/{stem}.py" for stem in [*first, *(stem for stem in stems if stem not in first)]]


def _tests(file: str, without_rehearsal: str = "") -> Case:
    options = ("-v", "--tb=short", "--junitxml={result}/junit.xml")
    rehearsal = () if without_rehearsal else ("{python}", "-m", "pytest", "-m", "not gpu and not slow", file, *options)
    return Case(
        name=f"tests {Path(file).parts[1]}/{Path(file).stem}",
        answers=f"whether {file} passes on the device",
        command=("{python}", "-m", "pytest", "-m", "gpu", file, *options),
        rehearsal=rehearsal,
        without_rehearsal=without_rehearsal,
        reader="pytest",
        expected_s=60,
        limit_s=240,
    )


def _operators(kind: str, shapes: Sequence[object]) -> Iterator[Case]:
    """Yields one case per shape; only the first is rehearsed, at a shape of its own."""
    tiny = {"logits": "V520-float32", "linear": "H64-float32"}[kind]
    options = ("--benchmark-only", "--benchmark-disable-gc", "--out", "{result}", "--budget-s", "{budget}")
    program = ("{python}", "-m", "pytest", "benchmarks/test_operators.py", *options)
    for number, shape in enumerate(shapes):
        yield Case(
            name=f"operators {kind} {shape}",
            answers=f"our operators beside all peers and the roof, from {kind}, at {shape}",
            command=(*program, "--device", "cuda", "--shapes", "standard", "-k", f"{shape}-bfloat16"),
            rehearsal=() if number else (*program, "--device", "cpu", "--shapes", "tiny", "-k", tiny, "--rounds", "2"),
            rehearsal_environment=(("TRITON_INTERPRET", "1"),),  # so that peers of Triton run, too
            without_rehearsal="the first shape's rehearsal runs the same code" if number else "",
            reader="operators",
            expected_s=90,
            limit_s=200,
        )


def _questions() -> Iterator[Case]:
    answers = {
        "paths": "which path of the linear loss is faster, chunks or tiles, and how much memory each takes",
        "l2": "how much of a tile of float32 logits is still in the L2 cache when it is read",
        "dw": "how fast the product of the weight's gradient is with 2048 and 4096 rows, alone and added to a sum",
        "dlogits": "how near the kernel that writes the logits' gradient comes to a plain copy",
    }
    for name, answer in answers.items():
        command = ("{python}", "-m", "benchmarks.gpu_questions", name, "--out", "{result}")
        yield Case(
            name=f"question {name}",
            answers=answer,
            command=command,
            rehearsal=(*command, "--tiny"),
            reader="json",
            expected_s=45,
            limit_s=120,
        )


def _trainer(shape: str, expected_s: float) -> Case:
    command = ("{python}", "-m", "benchmarks.trainer", "gpu", "--models", "{scratch}/models", "--out", "{result}")
    return Case(
        name=f"trainer {shape}",
        answers="utilisation of the update and of log-probs beside transformers with Liger, memory beside the plan's, "
        f"and the hand-over to host memory, at {shape}",
        command=(*command, "--shape", shape, "--rounds", "3", "--budget-s", "{budget}"),
        rehearsal=() if shape != "qwen2.5-1.5b" else (*command, "--tiny", "--rounds", "2", "--budget-s", "{budget}"),
        without_rehearsal="" if shape == "qwen2.5-1.5b" else "that of qwen2.5-1.5b runs the same code",
        reader="trainer",
        expected_s=expected_s,
        limit_s=480,
    )


def _lens(model: str, answers: str, expected_s: float) -> Case:
    command = (
        "{python}",
        "-m",
        "benchmarks.gpu_session.lens_run",
        model,
        "--scratch",
        "{scratch}",
        "--out",
        "{result}",
    )
    return Case(
        name=f"lens {model}",
        answers=answers,
        command=command,
        rehearsal=(*command, "--tiny"),
        reader="json",
        expected_s=expected_s,
        limit_s=480,
    )


def _sanitizer(tool: str, file: str, answers: str) -> Case:
    checked = (
        "compute-sanitizer",
        "--tool",
        tool,
        "--target-processes",
        "application-only",
        "{python}",
        "-m",
        "pytest",
    )
    return Case(
        name=f"sanitizer {tool}",
        answers=answers,
        command=(*checked, "-m", "gpu and not many_rows", "-k", "gpu-triton", file, "--junitxml={result}/junit.xml"),
        # PyTorch's cache of memory would hide reads beyond a tensor's end.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        without_rehearsal="the tool needs a device",
        reader="sanitizer",
        tool="compute-sanitizer",
        expected_s=150,
        limit_s=420,
    )


def _in_turn(*sequences: Sequence[Case]) -> Iterator[Case]:
    for number in range(max(map(len, sequences))):
        yield from (cases[number] for cases in sequences if number < len(cases))
