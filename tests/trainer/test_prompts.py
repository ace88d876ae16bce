"""Datasets -> prompts: exact rendering, and the mask of tokens that may be deleted."""

import json

import pytest
from prompt_data import BOX, CHATML, SHARED, TOKENIZER, error, load, make_tokenizer, pieces, text, write_jsonl
from transformers import AutoTokenizer

from lens_megatron.config import LensConfig

# ---- rendering -------------------------------------------------------------------------------------------------------


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
    """They begin with the tokenizer's beginning-of-sequence token if it adds one by itself."""
    tokenizer = make_tokenizer(template=None, bos=bos)
    prompt = one("How many", tokenizer=tokenizer, system_prompt="Hi")
    assert text(prompt, tokenizer) == "<s>" * bos + "Hi\nHow many\nBox it.\n"
    assert pieces(prompt, tokenizer) == ["How", " many"]


def test_a_chat_template_gets_no_beginning_of_sequence_from_the_tokenizer(one):
    tokenizer = make_tokenizer(bos=True)
    assert text(one("How many", tokenizer=tokenizer), tokenizer).startswith("<|im_start|>user")


# ---- what may be deleted ---------------------------------------------------------------------------------------------

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


# ---- what the data marks as noise ------------------------------------------------------------------------------------

TEXT = "How many two apples?"  # the tokens' characters: How 0-3, many 3-8, two 8-12, apples 12-19


def noisy(prompt, tokenizer=TOKENIZER) -> list[str]:
    """The tokens marked as noise."""
    assert len(prompt.noise) == len(prompt.token_ids)
    return [tokenizer.decode([t]) for t, is_noise in zip(prompt.token_ids, prompt.noise, strict=True) if is_noise]


@pytest.mark.parametrize(
    ("spans", "marked"),
    [
        ([[3, 12]], [" many", " two"]),
        ([[4, 12]], [" many", " two"]),  # the space before `many` belongs to the token, and lies outside
        ([[5, 12]], [" two"]),  # half of `many` does not
        ([[4, 7], [8, 12]], [" two"]),
        ([[3, 12], [0, 8]], ["How", " many", " two"]),  # overlapping, and in any order
        ([[0, 20]], ["How", " many", " two", " apples"]),  # `?` and the template's newline are one token
        ([[8, 8]], []),
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_tokens_wholly_inside_a_span_are_noise(one, spans, marked, trim_offsets):
    row, tokenizer = {"problem": TEXT, "answer": "1", "spans": spans}, make_tokenizer(trim_offsets=trim_offsets)
    assert noisy(one(row, noise_key="spans", tokenizer=tokenizer), tokenizer) == marked


def test_white_space_is_noise_only_where_it_is_marked_itself(one):
    row = {"problem": "How  many", "answer": "1", "spans": [[4, 9]]}
    prompt = one(row, noise_key="spans", lens=LensConfig(protect_whitespace=False))
    assert pieces(prompt) == ["How", " ", " many"] and noisy(prompt) == [" many"]
    assert noisy(one(row | {"spans": [[3, 9]]}, noise_key="spans")) == [" ", " many"]


def test_noise_is_found_in_the_last_message_and_under_every_reading_of_eligible(one):
    messages = [{"role": r, "content": c} for r, c in (("user", "How many"), ("assistant", "two"), ("user", TEXT))]
    row = {"prompt": messages, "answer": "1", "extra": {"spans": [[3, 8]]}}
    for eligible in ("problem", "user", "all_nonspecial", "all"):
        prompt = one(row, noise_key="extra.spans", lens=LensConfig(eligible=eligible))
        assert noisy(prompt) == [" many"] and prompt.noise.index(True) > len(prompt.token_ids) // 2


def test_without_a_beginning_of_sequence_nothing_before_the_problem_is_noise(one):
    """The tokenizer's own first token has no characters; a span that begins at 0 does not hold it."""
    tokenizer = make_tokenizer(template=None, bos=True)
    prompt = one({"problem": "How many", "answer": "1", "n": [[0, 8]]}, tokenizer=tokenizer, noise_key="n")
    assert noisy(prompt, tokenizer) == ["How", " many"] and prompt.noise[0] is False


def test_data_without_marks(one):
    row = {"problem": TEXT, "answer": "1", "spans": [[0, 3]]}
    assert one(row).noise == ()  # no column is asked for
    assert one(row, noise_key="other").noise == one(row | {"spans": None}, noise_key="spans").noise == ()
    assert one(row | {"spans": []}, noise_key="spans").noise == ()
    assert one(row, noise_key="spans", lens=LensConfig(enabled=False)).noise == ()


def test_noise_in_a_problem_that_the_template_rewrites(one):
    tokenizer = make_tokenizer(CHATML.replace("m['content']", "m['content'] | upper"))
    row, lens = {"problem": TEXT, "answer": "1", "spans": [[0, 3]]}, LensConfig(eligible="all")
    assert error(one, row, tokenizer=tokenizer, noise_key="spans", lens=lens).endswith(
        "so that its tokens cannot be told from the template's; leave data.noise_key empty"
    )


# ---- real data -------------------------------------------------------------------------------------------------------


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
