"""Datasets -> prompts: exact rendering, masks, answers and error messages, with a tokenizer small enough to read.

The tokenizer is byte-level BPE: a word with its space is one token if it is in WORDS, else its bytes are.
"""

import itertools
import json
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lens_megatron.config import DataConfig, LensConfig
from lens_megatron.data.prompts import DataError, PromptStream, load_prompts
from lens_megatron.types import Prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["user", "system", "assistant", " How", "How", " many", " two", " apples", "Box", " it", "?\n", " .", "Why"]
BOX = "Box it."
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def make_tokenizer(template: str | None = CHATML, trim_offsets: bool = False, bos: bool = False):
    to_bytes = {chr(b): c for b, c in zip(range(33, 127), map(chr, range(33, 127)), strict=True)}
    to_bytes |= {" ": "Ġ", "\n": "Ċ"}
    vocab, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in WORDS:
        letters = [to_bytes[c] for c in word]
        for end in range(1, len(letters)):
            merge = ("".join(letters[:end]), letters[end])
            if merge not in merges:
                merges.append(merge)
                vocab.append("".join(merge))
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, merges))
    pieces = Regex(r" ?[A-Za-z]+|[0-9]|[?.]?\n| ?[^A-Za-z0-9\n ]| ")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<s>", chat_template=template, model_max_length=64
    )


TOKENIZER = make_tokenizer()


def write_jsonl(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def load(source: str, tokenizer=TOKENIZER, lens: LensConfig | None = None, **data):
    data = DataConfig(**{"train": source, "instruction": BOX, **data})
    return load_prompts(source, tokenizer, data, lens or LensConfig())


@pytest.fixture
def one(tmp_path):
    """one(row, ...) -> the prompt of a dataset with that single row."""

    def load_one(row, **options) -> Prompt:
        if not isinstance(row, dict):
            row = {"problem": row, "answer": "1"}
        (prompt,) = load(write_jsonl(tmp_path / "one.jsonl", row), **options).prompts
        return prompt

    return load_one


def text(prompt: Prompt, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(prompt.token_ids)


def pieces(prompt: Prompt, tokenizer=TOKENIZER) -> list[str]:
    """The eligible tokens."""
    return [tokenizer.decode([t]) for t, go in zip(prompt.token_ids, prompt.eligible, strict=True) if go]


def error(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# ---- rendering ----------------------------------------------------------------------------------------------------


def test_a_text_row_becomes_a_user_turn_with_the_instruction(tmp_path):
    source = write_jsonl(tmp_path / "fruit.jsonl", {"problem": "How many?", "answer": "3"})
    loaded = load(source)
    (prompt,) = loaded.prompts
    assert text(prompt) == "<|im_start|>user\nHow many?\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    assert (prompt.index, prompt.answer, prompt.problem, prompt.source) == (0, "3", "How many?", "fruit")
    assert (loaded.dropped_too_long, loaded.source) == (0, source)


def test_the_system_prompt_goes_first_unless_the_row_brings_its_own(one):
    assert text(one("How many?", system_prompt="Hi")).startswith("<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\n")
    own = [{"role": "system", "content": "Own"}, {"role": "user", "content": "How many?"}]
    assert text(one({"prompt": own, "answer": "1"}, system_prompt="Hi")) == (
        "<|im_start|>system\nOwn<|im_end|>\n<|im_start|>user\nHow many?\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_earlier_turns_are_kept_and_only_the_last_user_turn_is_eligible(one):
    turns = [("user", "How many apples"), ("assistant", "two"), ("user", "How two")]
    prompt = one({"prompt": [{"role": r, "content": c, "name": None} for r, c in turns], "answer": "1"})
    assert text(prompt) == (
        "<|im_start|>user\nHow many apples<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nHow two\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (pieces(prompt), prompt.problem) == (["How", " two"], "How two")


@pytest.mark.parametrize("instruction", ["", "Box it.", "\n Box it.\n"])
def test_an_instruction_is_not_appended_twice_nor_an_empty_one_at_all(one, instruction):
    prompt = one("Box it. How many", instruction=instruction)
    assert text(prompt) == "<|im_start|>user\nBox it. How many<|im_end|>\n<|im_start|>assistant\n"
    if instruction:
        assert (pieces(prompt), prompt.problem) == ([" How", " many"], "How many")
    else:
        assert (pieces(prompt), prompt.problem) == (["Box", " it", ".", " How", " many"], "Box it. How many")


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_chat_template_the_messages_are_lines(one, bos):
    """And the tokenizer's beginning-of-sequence token stands there if it adds one by itself."""
    tokenizer = make_tokenizer(template=None, bos=bos)
    prompt = one("How many", tokenizer=tokenizer, system_prompt="Hi")
    assert text(prompt, tokenizer) == "<s>" * bos + "Hi\nHow many\nBox it.\n"
    assert pieces(prompt, tokenizer) == ["How", " many"]


def test_a_chat_template_gets_no_beginning_of_sequence_from_the_tokenizer(one):
    tokenizer = make_tokenizer(bos=True)
    assert text(one("How many", tokenizer=tokenizer), tokenizer).startswith("<|im_start|>user")


# ---- what may be deleted ------------------------------------------------------------------------------------------

USER = ["How", " many", " two", " apples"]
MASKS = {
    ("problem", True): USER,
    ("problem", False): [*USER[:2], " ", *USER[2:]],
    ("user", True): [*USER, "?\n", "Box", " it", "."],
    ("user", False): [*USER[:2], " ", *USER[2:], "?\n", "Box", " it", "."],
    ("all_nonspecial", True): ["user", *USER, "?\n", "Box", " it", ".", "assistant"],
    ("all_nonspecial", False): [
        *("user", "\n", "How", " many", " ", " two", " apples", "?\n", "Box", " it", ".", "\n", "assistant", "\n"),
    ],
    ("all", True): ["user", *USER, "?\n", "Box", " it", ".", "<|im_end|>", "<|im_start|>", "assistant"],
    ("all", False): [
        *("user", "\n", "How", " many", " ", " two", " apples", "?\n", "Box", " it", "."),
        *("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
    ],
}


@pytest.mark.parametrize(("eligible", "protect"), MASKS)
def test_masks(one, eligible, protect):
    """`?` and the newline after it are one token: it reaches over the edge of the problem and is no part of it."""
    prompt = one("How many  two apples?", lens=LensConfig(eligible=eligible, protect_whitespace=protect))
    assert pieces(prompt) == MASKS[eligible, protect]
    assert prompt.eligible[0] is False


def test_position_zero_is_never_eligible(one):
    tokenizer = make_tokenizer(template=None)
    prompt = one("How many", tokenizer=tokenizer, instruction="", lens=LensConfig(eligible="all"))
    assert pieces(prompt, tokenizer) == [" many"]


def test_nothing_is_eligible_when_purification_is_off(one):
    prompt = one("How many", lens=LensConfig(enabled=False, eligible="all"))
    assert prompt.eligible == (False,) * len(prompt.token_ids)


@pytest.mark.parametrize("problem", ["a", "user", "assistant", "im_start"])
def test_a_problem_that_the_template_contains_too_is_found_where_it_stands(one, problem):
    prompt = one(problem, instruction="")
    assert "".join(pieces(prompt)) == problem
    tokens = [TOKENIZER.decode([t]) for t in prompt.token_ids]
    assert prompt.eligible.index(True) == tokens.index("\n") + 1


def test_special_tokens_spelt_out_in_a_problem_are_protected(one):
    assert pieces(one("How<|im_end|> many")) == ["How", " many"]


def test_bytes_of_a_character_are_eligible_and_a_wide_space_is_not(one):
    prompt = one("€\u3000How")
    assert [go for go in prompt.eligible if go] == [True] * 4  # three bytes of the euro sign, and How
    assert len(pieces(one("€\u3000How", lens=LensConfig(protect_whitespace=False)))) == 7


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_with_the_templates_space_is_not_the_problems(one, trim_offsets):
    """Llama 3 trims spaces off the offsets, so that ` How` claims to begin at the H."""
    template = "{% for m in messages %}user {{ m['content'] }} .{% endfor %}assistant"
    tokenizer = make_tokenizer(template, trim_offsets)
    assert pieces(one("How many two", tokenizer=tokenizer, instruction=""), tokenizer) == [" many", " two"]
    blank = LensConfig(protect_whitespace=False)
    prompt = one("How  many  ", tokenizer=tokenizer, instruction="", lens=blank)
    assert pieces(prompt, tokenizer) == [" ", " many", " ", " "]
    assert pieces(one("How  many  ", tokenizer=tokenizer, instruction=""), tokenizer) == [" many"]


def test_a_template_may_trim_the_content(one):
    tokenizer = make_tokenizer(CHATML.replace("m['content']", "m['content'] | trim"))
    prompt = one("\n How many \n", tokenizer=tokenizer, instruction="", lens=LensConfig(protect_whitespace=False))
    assert text(prompt, tokenizer) == "<|im_start|>user\nHow many<|im_end|>\n<|im_start|>assistant\n"
    assert pieces(prompt, tokenizer) == ["How", " many"]
    assert pieces(one("\n How Box it. many", tokenizer=tokenizer), tokenizer) == ["How", " many"]


def test_a_template_that_rewrites_the_content_needs_another_setting(one):
    tokenizer = make_tokenizer(CHATML.replace("m['content']", "m['content'] | upper"))
    assert error(one, "How many", tokenizer=tokenizer).endswith(
        "one.jsonl:1: the chat template changes the text of the problem, so that its tokens cannot be told from the "
        "template's; set lens.eligible=all_nonspecial"
    )
    lens = LensConfig(eligible="all_nonspecial")
    assert "".join(pieces(one("How", tokenizer=tokenizer, lens=lens, instruction=""))) == "userHOWassistant"
    one("How", tokenizer=tokenizer, lens=LensConfig(enabled=False))


def test_a_template_that_refuses_the_messages(one):
    tokenizer = make_tokenizer("{{ raise_exception('no system role') }}")
    assert error(one, "How", tokenizer=tokenizer, system_prompt="Hi").endswith(
        "one.jsonl:1: the chat template refuses the messages (system, user): no system role"
    )


def test_a_template_that_renders_nothing(one):
    tokenizer = make_tokenizer("{{ '' }}")
    assert error(one, "How", tokenizer=tokenizer, lens=LensConfig(enabled=False)).endswith(
        "one.jsonl:1: the chat template writes the user's message 0 times instead of once; correct chat_template in "
        "the model directory"
    )


def test_a_slow_tokenizer_is_refused(tmp_path):
    class Slow:
        is_fast = False

    source = write_jsonl(tmp_path / "a.jsonl", {"problem": "How", "answer": 1})
    assert error(load, source, tokenizer=Slow()) == (
        "Slow is a slow tokenizer, which cannot tell where a token stands in the text; add a tokenizer.json to the "
        "model directory"
    )


# ---- columns and answers ------------------------------------------------------------------------------------------


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


# ---- mistakes -----------------------------------------------------------------------------------------------------

GOOD = '{"problem": "How", "answer": "1"}'
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


# ---- any input at all ---------------------------------------------------------------------------------------------

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow], database=None)
any_text = st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=12) | st.sampled_from(
    ["user", "system", "####", "a #### 3", "\\boxed{1}", "\\boxed{", "<|im_end|>", BOX, "\n"]
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(any_text, inner, max_size=3)
        | st.fixed_dictionaries({"role": inner, "content": inner})
        | st.fixed_dictionaries({"ground_truth": inner})
    ),
    max_leaves=6,
)
columns = st.sampled_from(
    ["problem", "question", "prompt", "answer", "solution", "label", "reward_model", "data_source"]
)
any_row = st.dictionaries(columns | any_text, any_json, max_size=5) | st.fixed_dictionaries(
    {"problem": any_text, "answer": any_json}
)


def loads_or_explains(path: Path, name: str, **options) -> None:
    """Prompts that are well-formed, or a DataError that names the file."""
    try:
        loaded = load(str(path), **options)
    except DataError as mistake:
        assert name in str(mistake)
        return
    for prompt in loaded.prompts:
        assert len(prompt.token_ids) == len(prompt.eligible) > 0 and not prompt.eligible[0]
        assert prompt.answer.strip() and prompt.problem.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


any_lines = st.lists(st.sampled_from([GOOD.encode(), b"\n", b"{", b"\x00", b"}", b"\xff"])).map(b"".join)


@FUZZ
@given(content=st.binary(max_size=200) | any_lines)
def test_fuzz_bytes(folder, content):
    (folder / "any.jsonl").write_bytes(content)
    loads_or_explains(folder / "any.jsonl", "any.jsonl")


@FUZZ
@given(content=st.binary(max_size=200), damage=st.integers(0, 10_000))
def test_fuzz_parquet_bytes(folder, content, damage):
    path = folder / "any.parquet"
    write_parquet(path, [{"problem": "How", "answer": "1"}] * 3)
    whole = path.read_bytes()
    at = damage % len(whole)
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])
    loads_or_explains(path, "any.parquet")


@FUZZ
@given(
    rows=st.lists(any_row, min_size=1, max_size=3), instruction=st.sampled_from(["", BOX]), system=any_text | st.none()
)
def test_fuzz_rows(folder, rows, instruction, system):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    system = None if system is None else system.encode("utf-8", "ignore").decode()
    loads_or_explains(folder / "rows.jsonl", "rows.jsonl", instruction=instruction, system_prompt=system)


@FUZZ
@given(problem=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), trim=st.booleans(), strip=st.booleans())
def test_eligible_tokens_spell_the_problem(folder, problem, trim, strip):
    """With spaces unprotected and no instruction, the eligible tokens are exactly the problem as the model reads it."""
    if not problem.strip() or "<|" in problem or "<s>" in problem:
        return
    source = write_jsonl(folder / "spell.jsonl", {"problem": problem, "answer": 1})
    tokenizer = TRIMMING[trim, strip]
    lens = LensConfig(protect_whitespace=False)
    (prompt,) = load(source, tokenizer=tokenizer, lens=lens, instruction="", max_prompt_length=10**6).prompts
    deletable = [t for t, go in zip(prompt.token_ids, prompt.eligible, strict=True) if go]
    assert tokenizer.decode(deletable) == (problem.strip() if strip else problem)


STRIPPED = CHATML.replace("m['content']", "m['content'] | trim")
TRIMMING = {
    (trim, strip): make_tokenizer(STRIPPED if strip else CHATML, trim)
    for trim, strip in itertools.product([False, True], repeat=2)
}


# ---- the stream ---------------------------------------------------------------------------------------------------


def numbered(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, (i,), (False,), "1", "p", "s") for i in range(count))


def drawn(stream: PromptStream, steps) -> list[int]:
    return [prompt.index for step in steps for prompt in stream.take(step)]


def test_without_shuffling_a_step_runs_over_the_end_of_the_dataset():
    stream = PromptStream(numbered(5), 3, seed=0, shuffle=False)
    assert [[p.index for p in stream.take(step)] for step in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert [stream.epoch(step) for step in (0, 1, 5)] == [0.0, 0.6, 3.0]


def test_the_order_of_a_seed_is_fixed_for_ever():
    """A run resumed with a later version of this file must meet the prompts it has not seen."""
    assert drawn(PromptStream(numbered(8), 4, seed=7), range(4)) == [0, 6, 7, 2, 4, 5, 1, 3, 6, 3, 1, 0, 2, 4, 7, 5]


def test_a_step_larger_than_the_dataset_spans_epochs():
    assert Counter(drawn(PromptStream(numbered(3), 9, seed=0), [5])) == {0: 3, 1: 3, 2: 3}


def test_only_the_last_permutation_is_kept():
    """At millions of prompts, one per epoch would add up."""
    stream = PromptStream(numbered(4), 6, seed=0)
    drawn(stream, range(20))
    assert len(stream._last_order) == 1


def test_seed_and_epoch_change_the_order():
    stream = PromptStream(numbered(50), 50, seed=1)
    first, second = drawn(stream, [0]), drawn(stream, [1])
    assert first != second and first != list(range(50))
    assert drawn(PromptStream(numbered(50), 50, seed=2), [0]) not in (first, second)


@settings(deadline=None, max_examples=100, database=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31 - 1), st.integers(0, 30), st.booleans())
def test_each_epoch_holds_each_prompt_once_and_a_fresh_stream_goes_on_alike(count, per_step, seed, step, shuffle):
    stream = PromptStream(numbered(count), per_step, seed, shuffle)
    order = drawn(stream, range(step + 1))
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert len(set(order[len(order) // count * count :])) == len(order) % count
    fresh = PromptStream(numbered(count), per_step, seed, shuffle)
    assert drawn(fresh, [step]) == order[step * per_step :]
    assert drawn(stream, [0]) == order[:per_step]  # asked again, out of order


def test_a_stream_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="a stream needs at least one prompt"):
        PromptStream((), 1, 0)
    with pytest.raises(ValueError, match="prompts_per_step must be at least 1, got 0"):
        PromptStream(numbered(1), 0, 0)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        PromptStream(numbered(1), 1, 0).take(-1)


# ---- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_real_qwen2_tokenizer_on_math500():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer_qwen2")
    loaded = load(str(SHARED / "eval" / "math500.jsonl"), tokenizer=tokenizer)
    rows = [json.loads(line) for line in (SHARED / "eval" / "math500.jsonl").open(encoding="utf-8")]
    for_each = [[{"role": "user", "content": f"{row['problem']}\n{BOX}"}] for row in rows]
    expected = tokenizer.apply_chat_template(for_each, add_generation_prompt=True)["input_ids"]
    assert {p.index: list(p.token_ids) for p in loaded.prompts} == {
        index: ids for index, ids in enumerate(expected) if len(ids) <= 512
    }
    assert loaded.dropped_too_long == 500 - len(loaded.prompts) == 3
    first = loaded.prompts[0]
    assert (first.source, first.answer) == ("math500", "\\left( 3, \\frac{\\pi}{2} \\right)")
    for prompt in loaded.prompts:
        deletable = "".join(pieces(prompt, tokenizer)).replace("\ufffd", "")
        assert len(prompt.problem.split()) * 0.8 < len(deletable) <= len(prompt.problem)
        assert BOX not in deletable and "<|im" not in deletable
