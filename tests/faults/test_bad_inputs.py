"""Inputs that cannot be used, hundreds of them: each ends with status 2 and one message, before anything is written.

None may hang, so each has ten seconds; none may be accepted, so the trainer stops where it would take the device.
"""

import gzip
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from toy_runs import Toy

from lens_megatron import build, train
from lens_megatron.output import report
from lens_megatron.output.metrics import read_metrics
from lens_megatron.reward.types import GradeStatus
from lens_megatron.rollout import replay
from lens_megatron.tools import doctor, plan
from lens_megatron.types import Group, Origin, Prompt, Rollout

PATIENCE_S = 10
LONG = 300 * "n"
VERY_LONG = "/" + 1_000 * "long/"
HUGE = "1" + 400 * "0"


class Accepted(Exception):
    """The input passed every check."""


class Hung(BaseException):
    """No Exception, which the trainer might take for the input's."""


@dataclass(frozen=True)
class Trainer:
    """The trainer's checks on inputs in `folder`, in this process."""

    toy: Toy
    folder: Path
    capsys: pytest.CaptureFixture

    def refusal(self, *overrides: str, config: Path | str | None = None, **sections: dict) -> str:
        """The error's message. Fails unless the status is 2 and nothing was written."""
        path = self.folder / "config.yaml" if config is None else config
        if config is None:
            path.write_text(yaml.safe_dump(self.toy.tree(self.folder / "run", **sections)))
        before = names(self.folder)
        with limited():
            status = train.main(["--config", str(path), *(text.replace("TMP", str(self.folder)) for text in overrides)])
        printed = self.capsys.readouterr().out
        assert status == 2 and "Traceback" not in printed
        assert names(self.folder) == before and not (self.folder / "run").exists()
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and len(printed) < 20_000, printed[:3_000]
        return printed.partition("error: ")[2]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class limited:
    """Raises Hung in the block after PATIENCE_S."""

    def __enter__(self) -> None:
        def hang(number: int, frame: object) -> None:
            raise Hung

        self.before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)


@pytest.fixture
def trainer(toy: Toy, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    def accept(*_: object) -> None:
        raise Accepted

    monkeypatch.setattr(train.platform, "init_process_group", lambda *_: None)
    monkeypatch.setattr(train, "told_by_main", lambda look, device: look())
    monkeypatch.setattr(train.Stop, "meet", lambda stop: None)
    monkeypatch.setattr(build.platform, "open_control_store", accept)
    monkeypatch.setattr(build, "_start_graders", lambda config: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Trainer(toy, tmp_path, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_is_refused_below_is_accepted_as_it_should_be(trainer: Trainer):
    with pytest.raises(Accepted):
        trainer.refusal()


# ---- options ------------------------------------------------------------------------------------------------------

PATHS = ("run.directory", "model.path", "model.reference_path", "data.train", "debug.save_rollouts",
         "debug.load_rollouts")  # fmt: skip
BAD_PATHS = {
    "''": "expected a path, got an empty text",
    "'  '": "expected a path, got an empty text",
    '"a\\0b"': "NUL byte",
    '"a\\ud800b"': "half a character",
    LONG: "may have 255 bytes, one has 300",
    f"/tmp/{LONG}/{LONG}.jsonl": "may have 255 bytes, one has 306",
    VERY_LONG: "may have 4095 bytes, this one has 5001",
    "~no_such_user/a.jsonl": "no such home folder",
    "[a]": "should be a valid string",
    "{a: b}": "should be a valid string",
    "17": "should be a valid string",
    "TMP/file/below.jsonl": "",
    "TMP/loop.jsonl": "",
    "TMP/fifo.jsonl": "",
    "TMP/zero.jsonl": "",
}


@pytest.mark.parametrize("value", BAD_PATHS, ids=lambda value: value[:30])
@pytest.mark.parametrize("name", PATHS)
def test_paths(trainer: Trainer, name: str, value: str):
    odd_files(trainer.folder)
    message = trainer.refusal(f"{name}={value}")
    assert name in message or value.replace("TMP", "") in message
    assert BAD_PATHS[value] in message


def odd_files(folder: Path) -> None:
    (folder / "file").write_text("text")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "zero.jsonl").symlink_to("/dev/zero")


NUMBERS = (
    "run.phase_timeout_minutes=1e300",
    "run.phase_timeout_minutes=1000000",
    "run.phase_timeout_minutes=.nan",
    "run.phase_timeout_minutes=-1",
    "run.seed=-1",
    f"run.seed={HUGE}",
    "run.seed=1.5",
    "reward.timeout_s=1e300",
    "reward.timeout_s=.inf",
    "reward.timeout_s=1e-300",
    "reward.timeout_s=10000000",
    "reward.workers_per_rank=100000",
    "reward.workers_per_rank=0",
    f"reward.workers_per_rank={HUGE}",
    "rollout.temperature=1e-300",
    "rollout.temperature=1e300",
    "rollout.temperature=.nan",
    "rollout.temperature=-1",
    "rollout.rollouts_per_prompt=2000000000",
    f"rollout.rollouts_per_prompt={HUGE}",
    f"rollout.prompts_per_step={HUGE}",
    f"rollout.max_response_length={HUGE}",
    "rollout.max_response_length=1000",
    f"rollout.max_running_sequences={HUGE}",
    "rollout.max_running_sequences=2000000000",
    "rollout.servers=100000",
    f"rollout.servers={HUGE}",
    "rollout.servers=[]",
    "rollout.servers=['http://a:99999']",
    "rollout.servers=['http://a:0']",
    "rollout.servers=['http://user@a:80']",
    "rollout.servers=[1]",
    "data.max_prompt_length=-1",
    f"data.max_prompt_length={HUGE}",
    "lens.tau=.nan",
    "lens.deletion_ratio=1e-300",
    "lens.min_score=1e300",
    "lens.min_score=-.inf",
    f"lens.min_keep_failures={HUGE}",
    "algorithm.advantage_eps=1e-300",
    "algorithm.advantage_eps=1e300",
    "algorithm.clip_high=1e300",
    "algorithm.dual_clip=1e300",
    "algorithm.kl_coef=1e300",
    "algorithm.entropy_coef=.inf",
    "algorithm.imitation_coef=1e39",
    "algorithm.correction_high=1e300",
    "optimizer.lr=1e300",
    "optimizer.lr=1e-300",
    f"optimizer.lr={HUGE}",
    "optimizer.lr=yes",
    "optimizer.adam_eps=1e-300",
    "optimizer.weight_decay=1e300",
    f"optimizer.lr_warmup_steps={HUGE}",
    "optimizer.clip_grad=1e300",
    f"train.steps={HUGE}",
    "train.steps=-1",
    "train.steps=[1]",
    f"train.max_tokens_per_micro_batch={HUGE}",
    f"train.updates_per_batch={HUGE}",
    f"train.eval_interval={HUGE}",
    "train.eval_samples=2000000000",
    "train.eval_temperature=1e-300",
    "train.eval_temperature=1e300",
    f"train.save_interval={HUGE}",
    f"train.save_total_limit={HUGE}",
    f"train.save_best_limit={HUGE}",
    f"train.max_skipped_updates={HUGE}",
    "megatron.tensor_model_parallel_size=1000",
    f"megatron.tensor_model_parallel_size={HUGE}",
    "megatron.pipeline_model_parallel_size=1000",
    "megatron.virtual_pipeline_model_parallel_size=7",
    f"megatron.virtual_pipeline_model_parallel_size={HUGE}",
    "megatron.context_parallel_size=1000",
    "megatron.expert_model_parallel_size=1000",
    "megatron.expert_tensor_parallel_size=1000",
    "vllm.tensor_parallel_size=-1",
    f"vllm.tensor_parallel_size={HUGE}",
    "vllm.gpu_memory_utilization=1e-300",
    f"cluster.nodes={HUGE}",
    "cluster.gpus_per_node=2000000000",
    "cluster.gpu_memory_gib=1e300",
    "cluster.host_memory_gib=.nan",
    "cluster.network_gb_s=1e-300",
)


@pytest.mark.parametrize("override", NUMBERS, ids=lambda text: text[:50])
def test_numbers(trainer: Trainer, override: str):
    name = override.partition("=")[0].rpartition(".")[2]
    assert name in trainer.refusal(override)


OTHERS = {
    "data.eval=['']": "data.eval.0",
    "data.eval=['', 3, null]": "data.eval.1",
    f"data.eval=[{LONG}]": "255 bytes",
    "data.eval=[TMP]": "is a folder",
    "data.train=json": "json:train: cannot be loaded as a Hugging Face dataset",
    "data.train=no/such-dataset": "cannot be loaded as a Hugging Face dataset",
    "data.train='no/such-dataset:train[:9%'": "cannot be loaded as a Hugging Face dataset",
    "data.problem_key=answer": "both problem and answer",
    "data.instruction=[a]": "data.instruction",
    'data.instruction="\\ud800"': "cannot be saved",
    'data.system_prompt="\\udfff"': "cannot be saved",
    f"data.{LONG * 100}=1": "unknown option data.nnn",
    "megatron.transformer=[1]": "megatron.transformer",
    "megatron.ddp={overlap_param_gather: true}": "overlap_param_gather",
    "megatron.transformer={no_such_field: 1}": "no_such_field",
    "megatron.transformer={num_layers: 7}": "num_layers",
    "megatron.transformer={hidden_size: 0}": "hidden_size",
    "megatron.transformer={hidden_dropout: no number}": "hidden_dropout",
    "megatron.transformer={recompute_granularity: most}": "recompute_granularity",
    "megatron.ddp={no_such_field: 1}": "no_such_field",
    "megatron.ddp={bucket_size: many}": "bucket_size",
    "megatron.optimizer={no_such_field: 1}": "no_such_field",
    "megatron.optimizer={loss_scale: much}": "loss_scale",
    "debug={save_rollouts: TMP/r, load_rollouts: TMP/../TMPNAME/r}": "",
    "train.metric_for_best_model=''": "no metric ''",
    "lens={tau: 0.1, tau: 0.2}": "'tau' stands 2 times",
    "run={directory: TMP/run, directory: TMP}": "'directory' stands 2 times",
    "data.train=TMP/file.jsonl.gz": "no such file",
    "model.path=TMP/file": "no config.json there",
    "model.reference_path=/nowhere": "no config.json there",
    "debug.save_rollouts=/dev/null/a": "/dev/null is a file",
    "debug.save_rollouts=/dev/null": "/dev/null is a file",
    "run.directory=/dev/null/a": "/dev/null",
    "megatron.optimizer={weight_decay: .inf}": "expected a finite number",
    "megatron.transformer={tensor_model_parallel_size: 2}": "set that",
    "megatron.transformer={init_method: xavier}": "init_method",
    "megatron.transformer={recompute_num_layers: '1'}": "write 1 without quotation marks",
    "megatron.transformer={recompute_num_layers: 1.0}": "write 1",
    "x" * 3_000: "expected section.option=value",
    "a." * 3_000 + "a=1": "unknown option",
    "lens=" + "[" * 5_000: "nested too deeply",
    "lens.tau=" + "{a: " * 200 + "1" + "}" * 200: "levels below each other",
}


@pytest.mark.parametrize("override", OTHERS, ids=lambda text: text[:50])
def test_other_options(trainer: Trainer, override: str):
    assert OTHERS[override] in trainer.refusal(override.replace("TMPNAME", trainer.folder.name))


# ---- files of options ---------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {
    "empty": (b"", "got NoneType"),
    "blank": (b"\n\n# nothing\n", "got NoneType"),
    "binary": (bytes(range(256)), "cannot be read"),
    "utf16": ("run: {}\n".encode("utf-16"), "save it as UTF-8"),
    "utf16 without mark": ("run: {}\n".encode("utf-16-le"), "cannot be read as YAML"),
    "gzip": (gzip.compress(b"run: {}\n"), "save it as UTF-8"),
    "nul": (b"run: \0", "cannot be read as YAML"),
    "list": (b"- 1", "got list"),
    "two documents": (b"run: {}\n---\nrun: {}\n", "cannot be read as YAML"),
    "key twice": (b"lens: {}\nlens: {}\n", "'lens' stands 2 times"),
    "key twice below": (b"run: {directory: a, directory: b}\n", "'directory' stands 2 times"),
    "list as key": (b"? [a]\n: 1\n", "cannot be read as YAML"),
    "number as key": (b"1: 2\n", "1: 1: Keys should be strings"),
    "null as key": (b"~: 2\n", "Keys should be strings"),
    "long key": (b"? " + b"a" * 2_000 + b"\n: 1\n", "unknown option aaa"),
    "too long": (b"# " + b"x" * (1 << 19), "more than 262,144 bytes"),
    "too many values": (b"a: [" + b"1," * 60_000 + b"]", "more than 20,000 values"),
    "aliases that multiply": (BOMB.encode() + b"megatron: {transformer: *i}\n", "more than 20,000 values"),
    "alias to itself": (b"megatron: {transformer: &x {a: *x}}\n", "an alias that names itself"),
    "base that is itself": (b"base: config.yaml\n", "in a circle"),
    "base that is a number": (b"base: 3\n", "expected a file name"),
    "base that is empty": (b"base: ['']\n", "expected a file name"),
    "base that is a folder": (b"base: .\n", "is a folder"),
    "base with a nul": (b'base: "a\\0b"\n', "no file can have this name"),
    "base with a long name": (f"base: {LONG}\n".encode(), "name too long"),
    "base of half a character": (b'base: "\\ud800"\n', "no file can have this name"),
    "base that is a fifo": (b"base: fifo.jsonl\n", "it is a FIFO"),
    "base that is endless": (b"base: zero.jsonl\n", "it is a device"),
    "base that is a loop": (b"base: loop.jsonl\n", "symbolic links"),
    "time out of range": (b"run: 2024-99-99\n", "cannot be read as YAML"),
    "tag": (b"run: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_files(trainer: Trainer, name: str):
    odd_files(trainer.folder)
    content, fragment = CONFIGS[name]
    path = trainer.folder / "config.yaml"
    path.write_bytes(content)
    assert fragment in trainer.refusal(config=path)


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("TMP/nothing.yaml", "no configuration file"),
        ("TMP", "is a folder"),
        ("TMP/fifo.jsonl", "it is a FIFO"),
        ("TMP/zero.jsonl", "it is a device"),
        ("TMP/loop.jsonl", "symbolic links"),
        ("/proc/self/mem", "cannot be read"),
        ("/proc/self/environ", "cannot be read"),
        ("a\0b", "no file can have this name"),
        ("\udcff", "no configuration file at \\udcff"),
        (LONG, "name too long"),
        (VERY_LONG, "name too long"),
        ("", "is a folder"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_configuration_paths(trainer: Trainer, path: str, fragment: str):
    odd_files(trainer.folder)
    assert fragment in trainer.refusal(config=path.replace("TMP", str(trainer.folder)))


def test_base_files_that_name_each_other_many_times(trainer: Trainer):
    """Two to the power of thirty readings, if each were read whenever it is named."""
    for number in range(30):
        (trainer.folder / f"{number}.yaml").write_text(f"base: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (trainer.folder / "30.yaml").write_text("lens: {tua: 1}\n")
    assert "unknown option lens.tua" in trainer.refusal(config=trainer.folder / "0.yaml")


# ---- data ---------------------------------------------------------------------------------------------------------

GOOD = b'{"problem": "1 + 1 = ?", "answer": "2"}\n'


def row(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def parquet(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


TABLE = pyarrow.table({"problem": ["1 + 1 = ?"] * 9, "answer": ["2"] * 9})
DATA = {
    "empty.jsonl": (b"", "holds no rows"),
    "only-breaks.jsonl": (b"\r\n\r\n", "holds no rows"),
    "gzip.jsonl": (gzip.compress(GOOD), "compressed by gzip"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd" + GOOD, "compressed by zstd"),
    "zip.jsonl": (b"PK\x03\x04" + GOOD, "zip archive"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "UTF-16"),
    "utf16be.jsonl": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "UTF-16"),
    "utf16-without-mark.jsonl": (GOOD.decode().encode("utf-16-le"), "malformed JSON"),
    "utf32.jsonl": (GOOD.decode().encode("utf-32"), "UTF-32"),
    "parquet-inside.jsonl": (parquet(TABLE), "is parquet"),
    "latin.jsonl": (GOOD + b'{"problem": "\xe9", "answer": 1}\n', "latin.jsonl:2: not UTF-8"),
    "half-character.jsonl": (b'{"problem": "\\ud800", "answer": 1}\n', "not valid Unicode"),
    "half-character-answer.jsonl": (b'{"problem": "a", "answer": "\\udfff"}\n', "not valid Unicode"),
    "half-character-source.jsonl": (b'{"problem": "a", "answer": 1, "data_source": "\\udfff"}\n', "not valid Unicode"),
    "carriage-returns.jsonl": (GOOD.replace(b"\n", b"\r") * 3, "malformed JSON"),
    "array.jsonl": (b"[" + GOOD + b"]", "malformed JSON"),
    "one-array.jsonl": (b"[1, 2]\n", "expected a JSON object"),
    "deep.jsonl": (GOOD + b"[" * 200_000 + b"\n", "deep.jsonl:2: malformed JSON"),
    "deep-answer.jsonl": (b'{"problem": "a", "answer": ' + b"[" * 500 + b"]" * 500 + b"}\n", "answer"),
    "digits.jsonl": (b'{"problem": "a", "answer": ' + b"9" * 5_000 + b"}\n", "malformed JSON"),
    "nan.jsonl": (b'{"problem": "a", "answer": NaN}\n', "finite"),
    "infinite.jsonl": (b'{"problem": "a", "answer": 1e999}\n', "finite"),
    "twice.jsonl": (b'{"problem": "a", "answer": "1", "answer": "2"}\n', "'answer' stands twice"),
    "twice-below.jsonl": (b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "answer": 1}', "twice"),
    "null-answer.jsonl": (row(problem="a", answer=None), "no answer"),
    "null-message.jsonl": (row(prompt=[None], answer=1), "prompt[0]"),
    "null-role.jsonl": (row(prompt=[{"role": None, "content": "a"}], answer=1), "prompt[0].role"),
    "nested-answer.jsonl": (row(problem="a", answer={"value": 1}), "expected text or a number"),
    "many-answers.jsonl": (row(problem="a", answer=["1", "2"]), "expected text or a number"),
    "true-answer.jsonl": (row(problem="a", answer=True), "expected text or a number"),
    "answer-below-text.jsonl": (row(problem="a", reward_model="text"), "no answer"),
    "long-problem.jsonl": (row(problem="a" * 1_000_001, answer=1), "1,000,001 characters"),
    "long-line.jsonl": (GOOD + row(problem="a", answer="1", extra="a" * (17 << 20)), "long-line.jsonl:2: the line has"),
    "long-conversation.jsonl": (
        row(prompt=[{"role": "user", "content": "a" * 900_000}] * 5, answer=1),
        "the most is 4,000,000",
    ),
    "empty.parquet": (b"", "cannot be read as parquet"),
    "random.parquet": (bytes(range(256)) * 64, "cannot be read as parquet"),
    "truncated.parquet": (parquet(TABLE)[:-20], "cannot be read as parquet"),
    "beheaded.parquet": (parquet(TABLE)[20:], "cannot be read as parquet"),
    "no-rows.parquet": (parquet(TABLE.slice(0, 0)), "holds no rows"),
    "no-columns.parquet": (parquet(pyarrow.table({"text": ["a"]})), "the columns are: text"),
    "twice.parquet": (
        parquet(pyarrow.Table.from_arrays([["a"], ["1"], ["2"]], names=["problem", "answer", "answer"])),
        "2 columns are called 'answer'",
    ),
    "bytes.parquet": (parquet(pyarrow.table({"problem": [b"a"], "answer": ["1"]})), "expected text"),
    "null.parquet": (parquet(pyarrow.table({"problem": ["a"], "answer": pyarrow.nulls(1)})), "no answer"),
    "nested.parquet": (parquet(pyarrow.table({"problem": ["a"], "answer": [{"b": 1}]})), "expected text or a number"),
    "jsonl-inside.parquet": (GOOD, "cannot be read as parquet"),
    "table.csv": (b"problem,answer\n", "cannot read .csv"),
    "plain": (GOOD, "a file without suffix"),
    "weird.jsonl.gz": (gzip.compress(GOOD), "cannot read .gz"),
    "LONG.jsonl": (b"x", "LONG.jsonl:1: malformed JSON"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(trainer: Trainer, name: str):
    content, fragment = DATA[name]
    path = trainer.folder / name
    path.write_bytes(content)
    for override in (f"data.train={path}", f"data.eval=[{path}]"):
        message = trainer.refusal(override)
        assert fragment in message and name in message


def test_a_line_without_end(trainer: Trainer):
    """A hundred gigabytes of nothing, which take no place on the disk."""
    for name in ("sparse.jsonl", "sparse.parquet"):
        with (trainer.folder / name).open("wb") as file:
            file.truncate(100 << 30)
        assert name in trainer.refusal(f"data.train={trainer.folder / name}")


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "dangling", "folder"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_data_that_is_no_file(trainer: Trainer, kind: str, suffix: str):
    path = trainer.folder / f"data.{suffix}"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to("/no/where")
        case "folder":
            path.mkdir()
    message = trainer.refusal(f"data.train={path}")
    word = {"fifo": "it is a FIFO", "device": "it is a device", "folder": "is a folder"}.get(kind, "leads to no file")
    assert str(path) in message and word in message


# ---- tokenizer and template ---------------------------------------------------------------------------------------

MESSAGES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEMPLATES = {
    "{{ 1 / 0 }}": "refuses the messages",
    "{{ messages[99].content }}": "refuses the messages",
    "{{ messages[0]['content'] + 1 }}": "refuses the messages",
    "{{ raise_exception('not today') }}": "not today",
    "{% for": "refuses the messages",
    "{{ no_such_function() }}": "refuses the messages",
    "{{ 'a' * 10 ** 7 }}" + MESSAGES: "the most is 4,000,000",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "refuses the messages",
    "{{ range(10 ** 9) | list }}": "refuses the messages",
    "{{ ''.__class__.__mro__ }}" + MESSAGES + MESSAGES: "",
    "fixed text": "0 times instead of once",
    "{{ '' }}": "0 times instead of once",
    "{% for m in messages %}{{ m['role'] }}{% endfor %}": "0 times instead of once",
    MESSAGES + MESSAGES: "2 times instead of once",
    "{% include 'other' %}": "refuses the messages",
}


def model_copy(toy: Toy, folder: Path) -> Path:
    return shutil.copytree(toy.model, folder / "model")


@pytest.mark.parametrize("enabled", ["true", "false"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(trainer: Trainer, template: str, enabled: str):
    model = model_copy(trainer.toy, trainer.folder)
    (model / "chat_template.jinja").write_text(template)
    message = trainer.refusal(f"model.path={model}", f"lens.enabled={enabled}")
    assert "train.jsonl:1: the chat template" in message and TEMPLATES[template] in message


def test_an_instruction_that_looks_like_a_template_stays_as_it_is(trainer: Trainer):
    model = model_copy(trainer.toy, trainer.folder)
    (model / "chat_template.jinja").write_text(MESSAGES)
    with pytest.raises(Accepted):
        trainer.refusal(f"model.path={model}", "data.instruction='{{ 1 / 0 }} {% for %} {# \\boxed{}'")


def edited(model: Path, name: str, **values: object) -> None:
    (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | values))


def far_token(model: Path) -> None:
    """The last token of the vocabulary that no merge makes gets another number."""
    tree = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    (model / "tokenizer.json").write_text(json.dumps(tree))


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "empty": lambda model: (model / "tokenizer.json").write_text(""),
    "no object": lambda model: (model / "tokenizer.json").write_text("[]"),
    "nothing in it": lambda model: (model / "tokenizer.json").write_text("{}"),
    "binary": lambda model: (model / "tokenizer.json").write_bytes(bytes(range(256))),
    "truncated": lambda model: os.truncate(model / "tokenizer.json", 1_000),
    "missing": lambda model: (model / "tokenizer.json").unlink(),
    "fifo": lambda model: ((model / "tokenizer.json").unlink(), os.mkfifo(model / "tokenizer.json")),
    "configuration fifo": lambda model: os.mkfifo(model / "special_tokens_map.json"),
    "template fifo": lambda model: ((model / "chat_template.jinja").unlink(missing_ok=True),
                                    os.mkfifo(model / "chat_template.jinja")),
    "configuration no object": lambda model: (model / "tokenizer_config.json").write_text("3"),
    "unknown class": lambda model: edited(model, "tokenizer_config.json", tokenizer_class=7),
    "token beyond the vocabulary": lambda model: far_token(model),
    "normalizer": lambda model: edited(model, "tokenizer.json", normalizer={"type": "Nonsense"}),
    "regular expression": lambda model: edited(
        model, "tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                                "invert": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(trainer: Trainer, name: str):
    model = model_copy(trainer.toy, trainer.folder)
    TOKENIZERS[name](model)
    said = trainer.refusal(f"model.path={model}")
    assert said.startswith("model.path") and str(model) in said


SHAPES = (
    {"hidden_size": 0},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 3},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 10**400},
    {"vocab_size": 0},
    {"vocab_size": 5},
    {"vocab_size": "many"},
    {"intermediate_size": 1.5},
    {"head_dim": -16},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": 20},
    {"max_position_embeddings": None},
)


@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_shapes(trainer: Trainer, values: dict):
    model = model_copy(trainer.toy, trainer.folder)
    edited(model, "config.json", **values)
    message = trainer.refusal(f"model.path={model}")
    assert "model" in message and ("config.json" in message or next(iter(values)) in message or "tokenizer" in message)


def test_a_reference_of_another_shape(trainer: Trainer):
    model = model_copy(trainer.toy, trainer.folder)
    edited(model, "config.json", hidden_size=32)
    assert "hidden_size is 32, model.path has 48; the reference must be a model of" in trainer.refusal(
        f"model.reference_path={model}"
    )


# ---- saved rollouts -----------------------------------------------------------------------------------------------


def group(place: int = 0) -> dict:
    rollout = Rollout((5, 6), (-0.5, -0.25), True, Origin.NATIVE, 0, 1.0, GradeStatus.CORRECT)
    prompt = Prompt(place, (1, 2, 3), (False, True, True), "12", "5 + 7 = ?", "train")
    return json.loads(replay.to_json(Group(prompt, (rollout,) * 4)))


def changed(*path: str | int, value: object) -> bytes:
    """Four saved groups, the last one with `value` at `path`."""
    rows = [group(place) for place in range(4)]
    node = rows[-1]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


WHOLE = changed("prompt", "index", value=3)
PURIFIED = {"token_ids": [1, 2], "deleted": [2], "scores": [0.0, 0.1, 0.2]}
REPLAYS = {
    "empty": (b"", "holds 0 groups, rollout.prompts_per_step asks for 4"),
    "one too few": (WHOLE[: WHOLE.rindex(b"\n", 0, -1) + 1], "holds 3 groups, rollout.prompts_per_step asks for 4"),
    "too many": (WHOLE * 2, "holds 8 groups"),
    "truncated": (WHOLE[:-100], ":4: not a saved group"),
    "binary": (bytes(range(256)), ":1: not a saved group"),
    "gzip": (gzip.compress(WHOLE), ":1: not a saved group"),
    "utf16": (WHOLE.decode().encode("utf-16"), ":1: not a saved group"),
    "list": (b"[]\n" * 4, ":1: not a saved group"),
    "null": (b"null\n" * 4, ":1: not a saved group"),
    "number": (b"1e999\n" * 4, ":1: not a saved group"),
    "deep": (b"[" * 100_000 + b"\n", ":1: not a saved group"),
    "no prompt": (b'{"purified": null}\n', "it has no 'prompt'"),
    "blank line": (b"\n" + WHOLE, ":1: not a saved group"),
    "prompt of text": (changed("prompt", value="text"), ":4: not a saved group"),
    "unknown key": (changed("prompt", "colour", value=1), ":4: not a saved group"),
    "text for tokens": (changed("prompt", "token_ids", value=["a", "b", "c"]), "are no token ids"),
    "no tokens": (changed("prompt", "token_ids", value=[]), "are no token ids"),
    "negative token": (changed("prompt", "token_ids", value=[1, -2, 3]), "are no token ids"),
    "fraction of a token": (changed("prompt", "token_ids", value=[1, 2.5, 3]), "are no token ids"),
    "token beyond": (changed("prompt", "token_ids", value=[1, 10**6, 3]), "token 1000000 is beyond"),
    "mask too short": (changed("prompt", "eligible", value=[True]), "eligible has 1 entries for 3 tokens"),
    "mask of numbers": (changed("prompt", "eligible", value=[0, 1, 1]), "no booleans"),
    "answer of null": (changed("prompt", "answer", value=None), "not all text"),
    "index of text": (changed("prompt", "index", value="3"), "is no row"),
    "index below zero": (changed("prompt", "index", value=-1), "is no row"),
    "no rollouts": (changed("native", value=[]), "native: no rollouts"),
    "rollout of null": (changed("native", 0, value=None), ":4: not a saved group"),
    "no completion": (changed("native", 0, "token_ids", value=[]), "native[0]: token_ids"),
    "huge token": (changed("native", 0, "token_ids", value=[5, 10**30]), "is beyond the model's vocabulary"),
    "log_probs too short": (changed("native", 1, "log_probs", value=[-1.0]), "native[1]: 1 log_probs for 2 tokens"),
    "log_probs not finite": (changed("native", 1, "log_probs", value=[-1.0, float("nan")]), "not finite"),
    "log_probs of text": (changed("native", 1, "log_probs", value=["a", "b"]), "native[1]"),
    "reward not finite": (changed("native", 2, "reward", value=float("inf")), "native[2]: reward inf"),
    "reward of null": (changed("native", 2, "reward", value=None), "native[2]: reward None"),
    "reward of truth": (changed("native", 2, "reward", value=True), "native[2]: reward True"),
    "unknown status": (changed("native", 3, "status", value="splendid"), "'splendid' is not a valid GradeStatus"),
    "unknown origin": (changed("native", 3, "origin", value="mars"), "'mars' is not a valid Origin"),
    "other origin": (changed("native", 3, "origin", value="purified"), "origin is purified, expected native"),
    "version of text": (changed("native", 3, "weight_version", value="1"), "weight_version"),
    "finished of text": (changed("native", 3, "finished", value="yes"), "finished no boolean"),
    "rescue without purified": (changed("rescue", value=[{**group()["native"][0], "origin": "purified"}]), "rescue"),
    "purified of text": (changed("purified", value="text"), ":4: not a saved group"),
    "purified without scores": (changed("purified", value={**PURIFIED, "scores": []}), "purified: 0 scores"),
    "purified scores not finite": (changed("purified", value={**PURIFIED, "scores": [0, 1, float("nan")]}), "scores"),
    "deleted beyond": (changed("purified", value={**PURIFIED, "deleted": [7]}), "are no positions of the prompt"),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_saved_rollouts(trainer: Trainer, name: str):
    content, fragment = REPLAYS[name]
    for step in (1, 2):
        replay.replay_path(str(trainer.folder), step).write_bytes(content)
    message = trainer.refusal(f"debug.load_rollouts={trainer.folder}")
    assert "step_000001.jsonl" in message and fragment in message


def test_saved_rollouts_that_are_good_but_too_few(trainer: Trainer):
    replay.replay_path(str(trainer.folder), 1).write_bytes(WHOLE)
    message = trainer.refusal(f"debug.load_rollouts={trainer.folder}")
    assert "has no step_000002.jsonl, train.steps is 2; the folder holds 1 steps" in message
    with pytest.raises(Accepted):
        trainer.refusal(f"debug.load_rollouts={trainer.folder}", "train.steps=1")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
def test_saved_rollouts_that_are_no_file(trainer: Trainer, kind: str):
    path = replay.replay_path(str(trainer.folder), 1)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "sparse":
            path.touch()
            os.truncate(path, 100 << 30)
    assert str(path) in trainer.refusal(f"debug.load_rollouts={trainer.folder}", "train.steps=1")


# ---- what is expanded and printed ---------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_in_every_path(trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    from lens_megatron import config as configuration

    monkeypatch.setenv("HOME", str(trainer.folder))
    tree = trainer.toy.tree(trainer.folder / "run", data={"eval": ["~/e.jsonl"]})
    found = configuration.from_tree(tree | {"debug": {"save_rollouts": "~/s", "load_rollouts": "~/l"}})
    home = str(trainer.folder)
    assert (found.data.eval, found.debug.save_rollouts) == ((f"{home}/e.jsonl",), f"{home}/s")
    assert found.debug.load_rollouts == f"{home}/l"
    shutil.copytree(trainer.toy.model, trainer.folder / "m")
    shutil.copy(trainer.toy.train, trainer.folder / "t.jsonl")
    overrides = ("run.directory=~/run", "model.path=~/m", "model.reference_path=~/m", "data.train=~/t.jsonl")
    with pytest.raises(Accepted):
        trainer.refusal(*overrides)
    demo = configuration.load(Path(__file__).parents[2] / "configs" / "demo.yaml")
    assert demo.model.path == f"{home}/.cache/lens_megatron/demo/model"


ODD_NAMES = ("$a$ $x^{", "$\\frac{$", "a\nb\tc", "a/b", "/", "..", "x" * 5_000, "\u6570\u5b66 \U0001f600",
             "_hidden", "%s{0}", "\x1b[31mred", "a/acc/mean@1", " ")  # fmt: skip


def test_names_of_sources_in_the_report(tmp_path: Path):
    accuracies = {f"val-core/{name}/acc/mean@1": 0.5 for name in ODD_NAMES}
    rows = [{"step": step, **accuracies} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.monotonic()
    text = report.write(tmp_path)
    assert time.monotonic() - started < 60
    assert text.count("accuracy on ") == len(ODD_NAMES) == len([li for li in text.splitlines() if " before, " in li])
    assert "accuracy on a/b: 50.0 %" in text and "accuracy on a\\nb\\tc: " in text and "\x1b" not in text
    assert len(max(text.splitlines(), key=len)) < 1_000
    assert (tmp_path / "learning_curve.png").stat().st_size > 1_000
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize("content", [None, b"", b"{}\n", b"3\n", b'{"step": 0, "timing_s/step": "a"}\n', b"\xff\xfe"])
def test_the_report_of_what_is_no_run(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    status = report.main([str(tmp_path)])
    assert status == (2 if content is None or b"timing" in content else 0)
    assert "Traceback" not in capsys.readouterr().err


# ---- the programs beside the trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize("override", [*NUMBERS, *OTHERS, *(f"{n}={v}" for n in PATHS[:4] for v in BAD_PATHS)],
                         ids=lambda text: text[:50])  # fmt: skip
def test_the_plan_of_what_cannot_run(trainer: Trainer, override: str):
    """The plan may say yes to what only the trainer can judge, but says it in time, and without a traceback."""
    odd_files(trainer.folder)
    path = trainer.folder / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.toy.tree(trainer.folder / "run")))
    with limited():
        status = plan.main([str(path), override.replace("TMP", str(trainer.folder))])
    printed = trainer.capsys.readouterr()
    assert status in (0, 2) and (status == 0 or printed.err.startswith("error: "))


@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_the_plan_of_odd_shapes(trainer: Trainer, values: dict):
    model = model_copy(trainer.toy, trainer.folder)
    edited(model, "config.json", **values)
    path = trainer.folder / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.toy.tree(trainer.folder / "run", model={"path": str(model)})))
    with limited():
        assert plan.main([str(path)]) == 2
    assert trainer.capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["gzip.jsonl", "twice.parquet", "long-line.jsonl", "tokenizer", "template", "fifo"])
def test_the_doctor_of_what_cannot_run(trainer: Trainer, name: str):
    model, data = model_copy(trainer.toy, trainer.folder), trainer.toy.train
    match name:
        case "tokenizer":
            (model / "tokenizer.json").write_text("{}")
        case "template":
            (model / "chat_template.jinja").write_text("{{ 1 / 0 }}")
        case "fifo":
            data = trainer.folder / "fifo.jsonl"
            os.mkfifo(data)
        case _:
            data = trainer.folder / name
            data.write_bytes(DATA[name][0])
    path = trainer.folder / "config.yaml"
    tree = trainer.toy.tree(trainer.folder / "run", model={"path": str(model)}, data={"train": str(data)})
    path.write_text(yaml.safe_dump(tree))
    with limited():
        assert doctor.main([str(path)]) == 1
    assert "fail" in trainer.capsys.readouterr().out.lower()
