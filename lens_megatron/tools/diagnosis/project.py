r"""Checks model, tokenizer and data for what training would meet in its first minute, by training's own code."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lens_megatron.config import Config
from lens_megatron.data.datasets import DataError
from lens_megatron.data.model_files import ModelError, stored_tensors
from lens_megatron.data.prompts import LoadedPrompts, load_prompts
from lens_megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from lens_megatron.reward import AnswerFacts, GraderStartError, GradeStatus, grade
from lens_megatron.tools.diagnosis.check import Check, CheckStatus
from lens_megatron.tools.planning.model_shape import ModelShape
from lens_megatron.tools.planning.plan import Plan
from lens_megatron.types import Prompt

GRADED_ROWS = 32
WRONG_ANSWER = "-918273645"
TOO_LONG_SHARE = 0.1


def layout(plan: Plan) -> Check:
    """Checks whether the plan fits the cluster."""
    if plan.mistakes:
        return Check("layout", CheckStatus.FAIL, "; ".join(plan.mistakes), "see python -m lens_megatron.plan")
    tightest = max(plan.phases, key=lambda phase: phase.total)
    free = (plan.cluster.memory_bytes - tightest.total) / (1 << 30)
    return Check("layout", CheckStatus.OK, f"fits; least free memory in the phase {tightest.phase}: {free:.1f} GiB")


def model(config: Config, shape: ModelShape) -> Check:
    """Reads directory, config.json and weights as training does, and the header of every weight file."""
    from lens_megatron.policy.model_check import check_model  # imports Megatron-Core

    try:
        check_model(config)
        stored = stored_parameters(Path(config.model.path))
    except ModelError as error:
        return Check("model", CheckStatus.FAIL, str(error), "download the model there, or set model.path")
    found = f"{shape.model_type}, {stored:,} parameters in {config.model.path}"
    tied = shape.vocab_size * shape.hidden_size  # some folders save a tied head as a second tensor
    if stored not in (shape.parameters, shape.parameters + tied * shape.tie_word_embeddings):
        remedy = "a weight file is missing or belongs to another model; download it again"
        return Check("model", CheckStatus.FAIL, f"{found}; config.json asks for {shape.parameters:,}", remedy)
    return Check("model", CheckStatus.OK, found)


def stored_parameters(folder: Path) -> int:
    """Counts the elements of all tensors in the folder's safetensors files by their headers. Raises ModelError."""
    return sum(tensor.elements for tensor in stored_tensors(folder).values())


def tokenizer(config: Config, vocab_size: int) -> tuple[Check, Tokenizer | None]:
    """Loads the tokenizer as training does; returns it too, or None where it cannot be used."""
    try:
        loaded = load_tokenizer(config.model.path, vocab_size)
    except TokenizerError as error:
        return Check("tokenizer", CheckStatus.FAIL, str(error), "copy the files of the model's own tokenizer"), None
    if not loaded.hf.chat_template:
        remedy = "prompts go in as plain text; a base model may answer so, an instruct model needs its template"
        return Check("tokenizer", CheckStatus.WARN, f"{len(loaded.hf)} tokens, no chat template", remedy), loaded
    return Check("tokenizer", CheckStatus.OK, f"{len(loaded.hf)} tokens, with a chat template"), loaded


def data(config: Config, loaded: Tokenizer) -> tuple[list[Check], LoadedPrompts | None]:
    """Renders and tokenizes every row of every file as training does; returns the training prompts too."""
    checks, training = [], None
    for source in (config.data.train, *config.data.eval):
        try:
            needs_rows = config.reward.needs_rows
            prompts = load_prompts(source, loaded.hf, config.data, config.lens, whole_rows=needs_rows)
        except DataError as error:
            checks.append(Check("data", CheckStatus.FAIL, str(error), "correct data.train, data.eval or the file"))
            continue
        training = prompts if source == config.data.train else training
        checks.append(_rows(config, prompts, is_training=source == config.data.train))
    return checks, training


def _rows(config: Config, loaded: LoadedPrompts, *, is_training: bool) -> Check:
    kept, dropped = len(loaded.prompts), loaded.dropped_too_long
    limit = config.data.max_prompt_length
    found = f"{loaded.source}: {kept} prompts, {dropped} longer than data.max_prompt_length={limit} dropped"
    if is_training and kept < config.rollout.prompts_per_step:
        remedy = f"give more data or lower rollout.prompts_per_step={config.rollout.prompts_per_step}"
        return Check("data", CheckStatus.FAIL, found, remedy)
    if dropped > TOO_LONG_SHARE * (kept + dropped):
        return Check("data", CheckStatus.WARN, found, "raise data.max_prompt_length")
    return Check("data", CheckStatus.OK, found)


def template(config: Config, loaded: Tokenizer, prompts: Sequence[Prompt]) -> Check:
    r"""Checks whether the rendered prompt of real rows asks for `\boxed` and has tokens that may be purified."""
    for prompt in prompts[:GRADED_ROWS]:
        text = loaded.decode_all(prompt.token_ids)
        row = f"row {prompt.index}"
        if "math_verify" in config.reward.graders and "\\boxed" not in text:
            remedy = "the grader reads the last \\boxed{}; ask for it in data.instruction"
            return Check("template", CheckStatus.WARN, f"{row}: no \\boxed in the prompt: {_short(text)}", remedy)
        if config.lens.enabled and not any(prompt.eligible):
            remedy = "set lens.eligible=user or all_nonspecial"
            return Check("template", CheckStatus.WARN, f"{row}: no token may be deleted: {_short(text)}", remedy)
    counts = sorted(sum(prompt.eligible) for prompt in prompts)
    eligible = f"; tokens that LENS may delete: median {counts[len(counts) // 2]}" if config.lens.enabled else ""
    return Check(
        "template",
        CheckStatus.OK,
        f"row {prompts[0].index}: {_short(loaded.decode_all(prompts[0].token_ids))}{eligible}",
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]} ... {text[-75:]}")


def grading(config: Config, prompts: Sequence[Prompt]) -> Check:
    r"""Grades three completions per row with the configured grader: its own answer boxed, another one, and none."""
    rows = prompts[:GRADED_ROWS]
    right = [f"It is \\boxed{{{prompt.answer}}}." for prompt in rows]
    wrong = [f"It is \\boxed{{{WRONG_ANSWER}}}."] * len(rows)
    answers = [prompt.answer for prompt in rows]
    try:
        grades = grade(
            right + wrong + ["I do not know."] * len(rows), answers * 3, config.reward.timeout_s, workers=1,
            grader=config.reward.grader, weights=config.reward.weights,
            facts=[AnswerFacts(prompt.source, prompt.record) for prompt in rows] * 3,
        )  # fmt: skip
        grades = [g.judged(config.reward.success_threshold) for g in grades]
    except (ValueError, GraderStartError) as error:
        return Check("grading", CheckStatus.FAIL, str(error), "correct reward.grader")
    own, other, none = grades[: len(rows)], grades[len(rows) : 2 * len(rows)], grades[2 * len(rows) :]
    if any(g.correct for g in (*other, *none)):
        found = (
            f"{sum(g.correct for g in other)} wrong and {sum(g.correct for g in none)} missing answers graded correct"
        )
        return Check(
            "grading", CheckStatus.FAIL, f"{found} of {len(rows)} each", "the grader rewards what is no answer"
        )
    good = sum(g.correct for g in own)
    statuses = dict(Counter(str(g.status) for g in own))
    found = f"{good} of {len(rows)} rows' own answers graded correct when boxed {statuses}"
    if good == len(rows):
        return Check("grading", CheckStatus.OK, f"{good} rows: own answer correct, another one wrong, none unparsed")
    first = next(i for i, g in enumerate(own) if g.status is not GradeStatus.CORRECT)
    example = f"row {rows[first].index}, answer {_short(answers[first])}: {own[first].status}, {own[first].detail}"
    status = CheckStatus.WARN if good >= 0.9 * len(rows) else CheckStatus.FAIL
    return Check("grading", status, f"{found}; {example}", "correct these answers, or set data.answer_key")
