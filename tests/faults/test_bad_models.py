"""Tokenizers, chat templates and shapes of models that cannot be used."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from refusals import Accepted, Trainer, edited, limited, model_copy

from lens_megatron.tools import plan

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


@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_the_plan_of_odd_shapes(trainer: Trainer, values: dict):
    model = model_copy(trainer.toy, trainer.folder)
    edited(model, "config.json", **values)
    path = trainer.folder / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.toy.tree(trainer.folder / "run", model={"path": str(model)})))
    with limited():
        assert plan.main([str(path)]) == 2
    assert trainer.capsys.readouterr().err.startswith("error: ")
