"""Datasets that cannot be used, each named in the message; the doctor finds them too."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from refusals import Trainer, limited, model_copy

from lens_megatron.tools import doctor

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
