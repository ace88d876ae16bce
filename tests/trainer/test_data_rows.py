"""Rows of datasets -> problems and answers, and the messages for rows and files that hold none."""

import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from prompt_data import GOOD, error, load, text, write_jsonl, write_parquet

# ---- columns and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "options", "problem", "answer"),
    [
        ({"prompt": "c", "question": "b", "problem": "a", "solution": "\\boxed{2}", "answer": "1"}, {}, "a", "1"),
        ({"prompt": "c", "question": "b", "ground_truth": "4", "label": "3"}, {}, "b", "3"),
        ({"prompt": "c", "ground_truth": "4"}, {}, "c", "4"),
        ({"problem": None, "prompt": "c", "answer": None, "label": 5}, {}, "c", "5"),
        ({"problem": "a", "answer": "1", "q": "x", "y": 7}, {"problem_key": "q", "answer_key": "y"}, "x", "7"),
        ({"problem": "a", "extra": {"gold": "8"}}, {"answer_key": "extra.gold"}, "a", "8"),
        ({"problem": "a", "solution": "9"}, {"answer_key": "solution"}, "a", "9"),
        ({"prompt": "a", "solution": "34", "reward_model": {"ground_truth": "35"}}, {}, "a", "35"),
    ],
)
def test_columns(one, row, options, problem, answer):
    prompt = one(row, **options)
    assert (prompt.problem, prompt.answer) == (problem, answer)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("72", "72"),
        (" \\frac{1}{2}\n", "\\frac{1}{2}"),
        (72, "72"),
        (-5, "-5"),
        (27.0, "27"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        ("She sold 48/2.\nSo 72.\n#### 72", "72"),
        ("48 + 24 = 72 #### 1,072 \n", "1,072"),
        ("#### Step 1\nadd\n#### 3", "3"),
        ("First \\boxed{1}, then \\boxed{\\frac{2}{3}}.", "\\frac{2}{3}"),
        ("#### Step 1\nnothing follows", "#### Step 1\nnothing follows"),
    ],
)
def test_answers(one, value, answer):
    assert one({"problem": "How", "answer": value}).answer == answer


def test_the_verl_schema(tmp_path):
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"How {index}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(index)},
            "extra_info": {"split": "train", "index": index, "answer": "no"},
        }
        for index, source in enumerate(["openai/gsm8k", None])
    ]
    for prompts in (
        load(write_parquet(tmp_path / "verl.parquet", rows)).prompts,
        load(write_jsonl(tmp_path / "verl.jsonl", *rows)).prompts,
    ):
        assert [(p.index, p.problem, p.answer, p.source) for p in prompts] == [
            (0, "How 0", "0", "openai/gsm8k"),
            (1, "How 1", "1", "verl"),
        ]
        assert text(prompts[1]) == "<|im_start|>user\nHow 1\nBox it.<|im_end|>\n<|im_start|>assistant\n"


def test_parquet_columns_of_numbers(tmp_path):
    floats = pyarrow.table({"question": ["a", "b"], "label": pyarrow.array([27.0, 0.5])})
    pyarrow.parquet.write_table(floats, tmp_path / "f.parquet")
    assert [p.answer for p in load(str(tmp_path / "f.parquet")).prompts] == ["27", "0.5"]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf\r\n{"problem": "\xe2\x82\xac", "answer": 1}\r\n \t\r\n{"problem": "b", "answer": 2}'
    )
    assert [(p.index, p.problem, p.answer) for p in load(str(path)).prompts] == [(0, "€", "1"), (1, "b", "2")]


def test_a_dataset_of_the_hub_is_read_by_name_and_split(monkeypatch):
    """Stands in for the network only: what is loaded is a real `datasets.Dataset`."""
    import datasets

    calls = []
    table = datasets.Dataset.from_dict({"question": ["How", "Why"], "answer": [1, 2], "image": ["x", "y"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: calls.append((name, split)) or table)
    assert [p.source for p in load("org/name").prompts] == ["org/name", "org/name"]
    assert [p.answer for p in load("name:test[:2]").prompts] == ["1", "2"]
    assert calls == [("org/name", "train"), ("name", "test[:2]")]
    assert error(load, "org/name", answer_key="gold") == (
        "org/name:train, row 1: no answer in data.answer_key='gold'; the columns are: question, answer, image; "
        "set data.answer_key to one of them"
    )


def test_a_dataset_that_the_hub_does_not_have(monkeypatch):
    def refuse(name, split):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=refuse))
    assert error(load, "org/name:test") == (
        "org/name:test: cannot be loaded as a Hugging Face dataset: ConnectionError: no route; if you meant a file, "
        "give its path; a dataset that needs a configuration must be saved as a file first"
    )


# ---- mistakes --------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "{": "malformed JSON: Expecting property name enclosed in double quotes at column 2; every line must be one JSON "
    "object",
    GOOD + "}": "malformed JSON: Extra data at column 34; every line must be one JSON object",
    "[" * 100_000: "malformed JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    "[1]": "expected a JSON object, got list ([1])",
    "{}": "no problem in any of problem, question, prompt; the columns are: none; set data.problem_key to one of them",
    '{"problem": "a", "id": 3}': "no answer in any of reward_model.ground_truth, answer, solution, label, ground_truth;"
    " the columns are: problem, id; set data.answer_key to one of them",
    '{"problem": null, "answer": 1}': "no problem in any of problem, question, prompt; the columns are: problem, "
    "answer; set data.problem_key to one of them",
    '{"problem": 5, "answer": 1}': "problem: expected text or a list of {role, content}, got int (5)",
    '{"problem": {"a": 1}, "answer": 1}': "problem: expected text or a list of {role, content}, got dict ({'a': 1})",
    '{"problem": " \\n", "answer": 1}': "problem: is empty",
    '{"problem": "Box it.\\n", "answer": 1}': "the problem is empty but for the instruction 'Box it.'",
    '{"problem": "\\ud800", "answer": 1}': "problem: not valid Unicode: '\\ud800' alone at 0",
    '{"prompt": [], "answer": 1}': "prompt: is empty",
    '{"prompt": ["a"], "answer": 1}': "prompt[0]: expected {role, content}, got str ('a')",
    '{"prompt": [{"role": "user"}], "answer": 1}': "prompt[0]: expected {role, content}, got dict ({'role': 'user'})",
    '{"prompt": [{"role": 1, "content": "a"}], "answer": 1}': "prompt[0].role: expected text, got int (1)",
    '{"prompt": [{"role": "user", "content": ["a"]}], "answer": 1}': "prompt[0].content: expected text, got list "
    "(['a'])",
    '{"prompt": [{"role": "user", "content": ""}], "answer": 1}': "prompt: is empty",
    '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": 1}': "prompt: the "
    "last message must be from 'user', got 'assistant'",
    '{"problem": "a", "answer": ["1", "2"]}': "answer: expected text or a number, got list (['1', '2'])",
    '{"problem": "a", "answer": true}': "answer: expected text or a number, got bool (True)",
    '{"problem": "a", "answer": NaN}': "answer: expected a finite number, got nan",
    '{"problem": "a", "answer": ""}': "answer: is empty",
    '{"problem": "a", "answer": "\\\\boxed{1"}': "answer: no answer: the last \\boxed is not closed",
    '{"problem": "a", "answer": "so\\n####"}': "answer: the answer after ####: is empty",
    '{"problem": "a", "solution": "so 3"}': "solution: no \\boxed{...} and no '#### answer' in it; add a column "
    "`answer`, or set data.answer_key=solution if the column holds bare answers",
    '{"problem": "a", "answer": 1, "data_source": 3}': "data_source: expected text, got int (3)",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    assert error(load, str(path)) == f"{path}:3: {BAD_LINES[line]}"


REMEDY = "; correct the column, or leave data.noise_key empty"
PAIR = "expected two whole numbers [start, end] from 0 to 3, the characters of the problem, got "
BAD_SPANS = {
    '"3-5"': "noise: expected a list of [start, end) characters of the problem, got str ('3-5')",
    "2": "noise: expected a list of [start, end) characters of the problem, got int (2)",
    '{"a": 1}': "noise: expected a list of [start, end) characters of the problem, got dict ({'a': 1})",
    "[0, 3]": f"noise[0]: {PAIR}0",
    "[[0, 3], [1]]": f"noise[1]: {PAIR}[1]",
    "[[0, 1, 2]]": f"noise[0]: {PAIR}[0, 1, 2]",
    '[["0", 3]]': f"noise[0]: {PAIR}['0', 3]",
    "[[0, 1.5]]": f"noise[0]: {PAIR}[0, 1.5]",
    "[[false, true]]": f"noise[0]: {PAIR}[False, True]",
    "[[-1, 2]]": f"noise[0]: {PAIR}[-1, 2]",
    "[[2, 1]]": f"noise[0]: {PAIR}[2, 1]",
    "[[0, 4]]": f"noise[0]: {PAIR}[0, 4]",
}


@pytest.mark.parametrize("spans", BAD_SPANS)
def test_spans_that_mark_nothing_are_named(tmp_path, spans):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{GOOD}\n{{"problem": "How", "answer": "1", "noise": {spans}}}\n', encoding="utf-8")
    assert error(load, str(path), noise_key="noise") == f"{path}:2: {BAD_SPANS[spans]}{REMEDY}"
    assert len(load(str(path)).prompts) == 2  # nobody asked for the column


def test_spans_are_read_from_parquet_too(tmp_path):
    rows = [{"problem": "How many", "answer": "1", "x": {"spans": spans}} for spans in ([[3, 8]], None)]
    prompts = load(write_parquet(tmp_path / "a.parquet", rows), noise_key="x.spans").prompts
    assert [sum(prompt.noise) for prompt in prompts] == [1, 0] and prompts[1].noise == ()


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"problem": "\xe9", "answer": 1}\n')
    assert error(load, str(path)) == f"{path}:2: not UTF-8: byte 0xe9 at column 14; save the file as UTF-8"


@pytest.mark.parametrize("which", ["problem", "answer"])
@pytest.mark.parametrize("key", ["q", "answer.b", "q.b"])
def test_a_configured_column_that_is_not_there(tmp_path, which, key):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    assert error(load, str(path), **{f"{which}_key": key}) == (
        f"{path}:1: no {which} in data.{which}_key='{key}'; the columns are: problem, answer; "
        f"set data.{which}_key to one of them"
    )


def test_bad_parquet_rows_and_files(tmp_path):
    path = str(tmp_path / "bad.parquet")
    write_parquet(Path(path), [{"problem": "a", "answer": ["1"]}])
    assert error(load, path) == f"{path}, row 1: answer: expected text or a number, got list (['1'])"
    write_parquet(Path(path), [{"problem": "a", "answer": "1", "id": 0}, {"problem": "a", "answer": None, "id": 1}])
    assert error(load, path) == (
        f"{path}, row 2: no answer in any of reward_model.ground_truth, answer, solution, label, ground_truth; "
        "the columns are: problem, answer, id; set data.answer_key to one of them"
    )
    write_parquet(Path(path), [{"text": "a", "id": 0}])
    assert error(load, path) == (
        f"{path}: no problem and no answer; the columns are: text, id; set data.problem_key and data.answer_key"
    )
    Path(path).write_bytes(b"PAR1 no parquet PAR1")
    assert error(load, path).startswith(f"{path}: cannot be read as parquet: ")
    pyarrow.parquet.write_table(pyarrow.table({"problem": pyarrow.array([], "string")}), path)
    assert error(load, path) == f"{path}: holds no rows"


def test_sources_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"\xef\xbb\xbf\n \n")
    (tmp_path / "a.csv").write_text("problem,answer")
    (tmp_path / "plain").write_text("")
    for source, message in {
        "empty.jsonl": "empty.jsonl: holds no rows",
        "missing.jsonl": "missing.jsonl: no such file",
        "a/b/c": "a/b/c: no such file",
        "./a": "./a: no such file",
        "~/no_such_folder/a": "~/no_such_folder/a: no such file",
        str(tmp_path): f"{tmp_path}: is a folder; name one .jsonl or .parquet file in it",
        "a.csv": "a.csv: cannot read .csv; use .jsonl or .parquet",
        "plain": "plain: cannot read a file without suffix; use .jsonl or .parquet",
        "no name": "'no name': neither a .jsonl or .parquet file nor the name of a dataset (name or name:split)",
    }.items():
        assert error(load, source) == message


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(GOOD)
    assert [p.source for p in load("~/a.jsonl").prompts] == ["a"]


def test_long_prompts_are_dropped_and_counted(tmp_path):
    rows = [{"problem": "How" + " many" * n, "answer": n} for n in (5, 0, 1, 9)]
    source = write_jsonl(tmp_path / "a.jsonl", *rows)
    shortest = 1 + 1 + 1 + 1 + 1 + 3 + 1 + 1 + 1 + 1 + 1  # <start> user \n How \n Box it . <end> \n <start> ... \n
    loaded = load(source, max_prompt_length=shortest + 1)
    assert [(p.index, p.answer, len(p.token_ids)) for p in loaded.prompts] == [(1, "0", 13), (2, "1", 14)]
    assert loaded.dropped_too_long == 2
    assert error(load, source, max_prompt_length=shortest - 1) == (
        f"{source}: all 4 prompts are longer than data.max_prompt_length=12; the shortest has 13 tokens"
    )


def test_order_is_kept_over_batches_and_nothing_is_written(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *({"problem": f"How {n}", "answer": n} for n in range(1300)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prompts = load(source).prompts
    assert [p.answer for p in prompts] == [str(n) for n in range(1300)]
    assert [text(p).splitlines()[1] for p in prompts] == [f"How {n}" for n in range(1300)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
