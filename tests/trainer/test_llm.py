"""Problems, cold start, evaluation and the folder of `python -m lens_megatron.llm`."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ROOT, Toy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lens_megatron import config
from lens_megatron.data.datasets import read_records
from lens_megatron.tools.demo.problems import stream
from lens_megatron.tools.llm import cold_start, command, evaluation, problems, training_state
from lens_megatron.tools.llm.cold_start import ColdStart, SolvedRow
from lens_megatron.tools.llm.folders import LlmError, LlmFolder, check_room, lock, whole_folder

OPTIONS = ColdStart(steps=6, batch=4, micro_batch=2, lr=1e-3, checkpoint_interval=2, bfloat16=False)


@pytest.fixture(scope="module")
def base(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(toy.model)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    options = dict(num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlmFolder:
    """A folder with few data."""
    monkeypatch.setattr(problems, "SOLUTIONS", 10)
    monkeypatch.setattr(problems, "TRAIN_PROBLEMS", 12)
    made = LlmFolder(tmp_path / "llm")
    made.root.mkdir()
    problems.write_data(made, "words")
    return made


# ---- problems -----------------------------------------------------------------------------------------------------


def test_numbers_in_words():
    assert [problems.number_in_words(n) for n in (0, 13, 20, 42, 99)] == [
        "zero", "thirteen", "twenty", "forty-two", "ninety-nine",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="from 0 to 99, got 100"):
        problems.number_in_words(100)


def test_facts_are_spelled_and_distractors_keep_their_place():
    text, noise = problems.spell_facts("Tom (9) has 9 nuts [4]. It is 12.", ((3, 7), (18, 22)))
    assert text == "Tom (9) has nine nuts [4]. It is twelve."
    assert [text[a:b] for a, b in noise] == [" (9)", " [4]"]
    assert problems.spell_facts("7", ()) == ("seven", ())


@pytest.mark.parametrize(
    "kind, numbers, solution",
    [
        ("add", (9, 4), "9 + 4 = 13, so the answer is \\boxed{13}."),
        ("mul_sub", (3, 4, 2), "3 * 4 = 12 and 12 - 2 = 10, so the answer is \\boxed{10}."),
    ],
)
def test_solutions(kind: str, numbers: tuple[int, ...], solution: str):
    assert problems.solution_in_sentences(kind, numbers) == solution


def test_only_distractors_have_digits_and_every_solution_states_the_answer():
    for p in islice(stream("train", 3, {0: 1, 3: 1}), 300):
        made = problems.word_problem(p, "words")
        clean = made.text
        for start, end in reversed(made.noise):
            clean = clean[:start] + clean[end:]
        assert not re.search(r"\d", clean) and not re.search(r"\d", made.core)
        assert " ".join(clean.split()) == made.core
        assert len(made.noise) == p.noise and made.solution.endswith(f"\\boxed{{{p.answer}}}.")
        assert problems.word_problem(p, "digits").text == p.problem


def test_the_trainer_reads_the_data_with_its_noise(folder: LlmFolder):
    path = ROOT / "configs" / "llm.yaml"
    options = config.load(path, [f"data.train={folder.data}/train.jsonl"]).data
    records = read_records(options.train, options)
    wanted = [problems.word_problem(p, "words") for p in islice(stream("train", 0, dict(problems.NOISE_SHARES)), 12)]
    assert [(r.messages[-1].content, r.answer, r.noise) for r in records] == [
        (p.text, p.answer, p.noise) for p in wanted
    ]
    assert options.instruction == problems.LLM_INSTRUCTION


def test_held_out_problems_are_in_no_training_data():
    seen = {p.core for p in islice(problems.clean_problems("words"), 800)}
    seen |= {
        problems.word_problem(p, "words").core for p in islice(stream("train", 0, dict(problems.NOISE_SHARES)), 2000)
    }
    assert not seen & {p.core for n in range(4) for p in islice(problems.held_out_problems("words", n), 48)}


# ---- the folder ---------------------------------------------------------------------------------------------------


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "part"
    (tmp_path / ".part.partial" / "sub").mkdir(parents=True)  # of a process that was killed
    with pytest.raises(RuntimeError), whole_folder(target) as partial:
        assert not list(partial.iterdir())
        (partial / "file").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for content in ("one", "two"):
        with whole_folder(target) as partial:
            (partial / "file").write_text(content)
        assert (target / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_second_launch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    with lock(tmp_path), pytest.raises(LlmError, match=r"is in use by process \d+; wait for it"), lock(tmp_path):
        pass
    with lock(tmp_path):
        assert command.main(["data", "--out", str(tmp_path)]) == 2
        assert command.main(["status", "--out", str(tmp_path)]) == 0
    assert "is in use by process" in capsys.readouterr().err


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path):
    with pytest.raises(LlmError, match=r"has \d+\.\d GB free, this part needs 1000000\.0 GB"):
        check_room(tmp_path, 10**15)


def test_parts_say_what_is_missing_and_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = ["--out", str(tmp_path)]
    for part, missing in (("convert", "llm fetch"), ("cold-start", "llm convert"), ("evaluate", "holds no model")):
        assert command.main([part, *out]) == 2
        assert missing in capsys.readouterr().err
    assert command.main(["data", *out]) == 0
    assert command.main(["data", *out]) == 0
    assert "data: is done already" in capsys.readouterr().out
    assert command.main(["data", *out, "--facts", "digits"]) == 2
    assert "has facts in words, --facts asks for digits" in capsys.readouterr().err
    (tmp_path / "data" / "cold_start.jsonl").write_text("{")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert command.main(["cold-start", *out]) == 2
    assert "cold_start.jsonl is damaged" in capsys.readouterr().err
    assert command.main(["status", *out]) == 0
    assert re.findall(r"^(\S+) +(done|not done)", capsys.readouterr().out, re.M) == [
        ("fetch", "not done"), ("convert", "done"), ("data", "done"), ("cold-start", "not done"),
    ]  # fmt: skip


# ---- the cold start -----------------------------------------------------------------------------------------------


def test_an_epoch_has_every_row_once_and_a_batch_depends_on_its_step_alone():
    rows = [SolvedRow((1,) * n, (2,)) for n in range(1, 13)]
    epochs = [[cold_start.batch_at(step, rows, OPTIONS) for step in range(first, first + 3)] for first in (0, 3)]
    for epoch in epochs:
        assert sorted((row for batch in epoch for row in batch), key=len) == rows
        assert all(batch == sorted(batch, key=len) for batch in epoch)
    assert epochs[0] != epochs[1]


def test_a_step_has_the_gradient_of_the_mean_over_the_completions_tokens(base: Path):
    rows = [
        SolvedRow((5, 6), (7,)),
        SolvedRow((8,), (9, 10)),
        SolvedRow((5, 9, 11, 4), (3, 2, 6)),
        SolvedRow((4,), (2,)),
    ]
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    terms = []
    for row in rows:  # one by one and without padding
        tokens = torch.tensor([row.prompt + row.completion])
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        first = len(row.prompt)
        terms += [-logprobs[t - 1, tokens[0, t]] for t in range(first, tokens.shape[1])]
    assert len(terms) == 7
    mean = torch.stack(terms).mean()
    mean.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    expected = {name: p.detach() - 0.1 * p.grad for name, p in model.named_parameters()}
    trained = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    loss = cold_start.train_step(trained, optimizer, rows, 0, OPTIONS)
    assert norm > 0 and loss == pytest.approx(mean.item(), rel=1e-5)
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_the_loss_falls_in_bfloat16_too(base: Path):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = replace(OPTIONS, bfloat16=True)
    losses = [cold_start.train_step(model, optimizer, [SolvedRow((5, 6), (7, 8))], 0, options) for _ in range(8)]
    assert losses[-1] < losses[0] - 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_cold_start_that_was_killed_goes_on_as_if_it_had_not(
    base: Path, folder: LlmFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = LlmFolder(tmp_path / "whole")
    problems.write_data(whole, "words")
    cold_start.cold_start(whole, base, OPTIONS)

    step, calls = cold_start.train_step, []

    def killed_in_its_fourth_call(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return step(*arguments)

    monkeypatch.setattr(cold_start, "train_step", killed_in_its_fourth_call)
    with pytest.raises(Killed):
        cold_start.cold_start(folder, base, OPTIONS)
    assert training_state.newest_step(folder.checkpoints) == 2 and not folder.cold_start.exists()
    cold_start.cold_start(folder, base, OPTIONS)
    assert len(calls) == 8  # 3 steps and the killed one, then steps 3 to 6
    ours, theirs = (load_file(f.cold_start / "model.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = load_file(base / "model.safetensors")
    assert all(not torch.equal(start[name], ours[name]) for name in ours)
    assert not folder.checkpoints.exists()
    cold_start.check_same(folder, base, OPTIONS)
    with pytest.raises(LlmError, match="was made from another model, other solutions or other options"):
        cold_start.check_same(folder, base, replace(OPTIONS, lr=2e-3))


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(base: Path, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cold_start.train_step(model, optimizer, [SolvedRow((5, 6), (7, 8))], 0, OPTIONS)
    training_state.save_state(tmp_path, "this", [1.0], model, optimizer)
    with pytest.raises(LlmError, match="is of a training from another model"):
        training_state.load_state(tmp_path, "that", model, optimizer)
    moments = tmp_path / "step_00001" / "moments.safetensors"
    moments.write_bytes(moments.read_bytes()[:-10])
    with pytest.raises(LlmError, match="is damaged .*; remove .* to start over"):
        training_state.load_state(tmp_path, "this", model, optimizer)


# ---- evaluation ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_with_the_level_it_lacks(
    base: Path, folder: LlmFolder, monkeypatch: pytest.MonkeyPatch
):
    sampling = evaluation.Sampling("words", problems=3, max_tokens=4)
    sample, seeds = evaluation.sample, []

    def killed_in_its_third_call(*arguments: object, seed: int) -> list[list[int]]:
        seeds.append(seed)
        if len(seeds) == 3:
            raise Killed
        return sample(*arguments, seed=seed)

    monkeypatch.setattr(evaluation, "sample", killed_in_its_third_call)
    with pytest.raises(Killed):
        evaluation.evaluate(folder, base, sampling)
    measured = evaluation.evaluate(folder, base, sampling)
    assert seeds == [0, 1, 2, 2, 3] and measured.is_complete
    assert [(level.distractors, level.problems, level.correct) for level in measured.levels] == [
        (0, 3, 0), (1, 3, 0), (2, 3, 0), (3, 3, 0),
    ]  # fmt: skip
    assert all(1 <= level.tokens <= 4 for level in measured.levels)
    assert evaluation.evaluate(folder, base, sampling) == measured and len(seeds) == 5
    evaluation.evaluate(folder, base, replace(sampling, seed=1))
    assert seeds[5:] == [100, 101, 102, 103]


def test_a_completion_ends_with_its_first_end_token():
    assert evaluation._until_end([5, 2, 2, 2], end=2) == [5, 2]
    assert evaluation._until_end([5, 6], end=2) == [5, 6]


def test_samples_are_functions_of_the_seed(base: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    asked = list(islice(problems.held_out_problems("words", 1), 4))
    sampling = evaluation.Sampling("words", max_tokens=30)
    first, again, other = (evaluation.sample(model, tokenizer, asked, sampling, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(1 <= len(tokens) <= 30 for tokens in first)


def test_the_table_counts_boxes_and_right_answers(base: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [problems.WordProblem("", "", "", answer, (), "add") for answer in ("5", "6", "7")]
    texts = ("2 + 3 = 5, so the answer is \\boxed{5}.", "\\boxed{6} no, \\boxed{8}", "7")
    level = evaluation._graded(1, asked, [tokenizer.encode(text) for text in texts], tokenizer)
    assert (level.correct, level.boxed, level.problems) == (1, 2, 3)
    measured = evaluation.Measured("", evaluation.Sampling("words"), (level,))
    assert re.search(r"1 +1/3 +33 % +67 %", evaluation.table(measured)) and not measured.is_complete


def test_a_run_stands_for_its_newest_export(base: Path, tmp_path: Path):
    for step in (6, 12):
        hf = tmp_path / "checkpoints" / f"iter_{step:07d}" / "hf"
        hf.mkdir(parents=True)
        (hf / "config.json").touch()
    assert evaluation.model_folder(tmp_path) == hf
    assert evaluation.model_folder(base) == base
    with pytest.raises(LlmError, match="holds no model"):
        evaluation.model_folder(tmp_path / "checkpoints")
