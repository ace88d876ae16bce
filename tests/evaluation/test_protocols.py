"""Protocols: the texts and settings of the named ones, the hash, and what a user's file may say."""

from pathlib import Path

import pytest

from lens_megatron.config import ConfigError
from lens_megatron.evaluation.protocols import NAMED, EvalProtocol, describe, load_protocol

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


def test_the_papers_protocol():
    paper = load_protocol("lens-paper")
    assert (paper.temperature, paper.top_p, paper.top_k, paper.max_tokens) == (1.0, 1.0, 0, 4096)
    counts = [paper.samples_for(name) for name in ("math500", "amc23", "aime24", "aime25", "minerva")]
    assert counts == [1, 16, 16, 16, 1]


def test_templates_are_those_of_their_sources():
    """Written out from the public sources that protocols.py names."""
    assert NAMED["qwen-boxed"].template == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{{problem}}\n{BOXED}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert NAMED["qwen25-math-cot"].template == (
        f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert NAMED["no-template"].template == "{problem}" and NAMED["no-template"].instruction == ""
    r1 = NAMED["r1"]
    assert (r1.temperature, r1.top_p, r1.max_tokens, r1.samples, r1.system_prompt) == (0.6, 0.95, 32_768, 64, None)


def test_the_hash_is_of_all_fields_but_the_name():
    paper = load_protocol("lens-paper")
    assert paper.hash == paper.model_copy(update={"name": "other"}).hash and len(paper.hash) == 16
    changes = {
        "template": "{problem}", "instruction": "x", "system_prompt": "x", "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "max_tokens": 7, "stop": ("x",), "extractor": "gsm8k", "samples": 2, "samples_of": {},
    }  # fmt: skip
    assert set(changes) == set(EvalProtocol.model_fields) - {"name"}
    hashes = {paper.model_copy(update={field: value}).hash for field, value in changes.items()}
    assert len(hashes | {paper.hash}) == len(changes) + 1


def test_the_hash_stays_what_published_results_say():
    """A change here makes earlier results incomparable: raise `_FORMAT` only for a changed meaning."""
    hashes = {name: protocol.hash for name, protocol in NAMED.items()}
    assert hashes == {
        "lens-paper": "4ac0b9ef056e09d6",
        "qwen-boxed": "10522e2eda1f46da",
        "qwen25-math-cot": "087aab13013035d3",
        "r1": "2afb41a9c208e7ba",
        "no-template": "0a7337a0c61b911b",
    }


def test_a_file_is_a_protocol(tmp_path: Path):
    (tmp_path / "below.yaml").write_text("temperature: 0.6\nmax_tokens: 99\n")
    (tmp_path / "mine.yaml").write_text("base: below.yaml\ntemperature: 0.7\nsamples_of: {aime24: 32}\n")
    mine = load_protocol(str(tmp_path / "mine.yaml"))
    assert (mine.name, mine.temperature, mine.max_tokens, mine.samples_for("aime24")) == ("mine", 0.7, 99, 32)
    assert mine.with_samples(4).samples_for("aime24") == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("temperatur: 1", "did you mean temperature"),
        ("temperature: 0.001", "give 0, or 0.01 and more"),
        ("top_p: 0", "top_p: 0: Input should be greater than 0"),
        ("template: no place", "has {problem} 0 times; write it once"),
        ("{template: '{problem}', system_prompt: x}", "write it into the template"),
        ("extractor: box", "did you mean boxed"),
        ("samples_of: {aime24: 0}", "aime24: 0 samples; give 1 to 10000"),
        ("stop: ['']", "stop has an empty text"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_protocol(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no protocol is called 'lens'; known: lens-paper, .*a \.yaml file"):
        load_protocol("lens")


def test_the_description_says_what_is_sampled():
    assert describe(NAMED["r1"]) == (
        f"protocol r1 {NAMED['r1'].hash}: temperature 0.6, top-p 0.95, 32768 tokens, 64 samples of a problem, "
        "extractor boxed"
    )
