"""Configuration files that cannot be read, or that hold something else than options."""

import gzip

import pytest
from refusals import LONG, VERY_LONG, Trainer, odd_files

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
