"""Checks and reads the files of a Hugging Face model directory without loading a weight."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from lens_megatron.errors import UserError

WEIGHT_INDEX = "model.safetensors.index.json"
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")
_OTHER_FORMATS = {
    b"PK\x03\x04": "a pickle of torch.save; convert it: model.save_pretrained writes safetensors",
    b"\x80": "a pickle; convert it: model.save_pretrained writes safetensors",
    b"version https://git-lfs": "Git LFS's pointer to the file; run git lfs pull there",
    b"<": "a web page; download the file itself",
}
"""The first bytes of other formats that are found in place of safetensors, what they are, and the remedies."""


class ModelError(UserError):
    """The user's model directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The entry of a tensor in the header of a safetensors file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """The dtype by its name in safetensors, e.g. BF16."""

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def stored_tensors(folder: Path, option: str = "model.path") -> dict[str, StoredTensor]:
    """Returns by name the tensors that the headers of the weight files list, or if there is an index, those in it.

    Raises ModelError, which names the file, if one is missing, empty, truncated, damaged or no safetensors at all, or
    if the index is broken.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{option} {folder}: no *.safetensors file there; weights in other formats are not read")
    found = {name: tensors for name in files for tensors in [_header(folder / name, option)]}
    if not (folder / WEIGHT_INDEX).exists():
        return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}
    stored = {}
    for name, file in _weight_map(folder, option).items():
        if file not in found:
            raise ModelError(f"{option} {folder}: {file} is missing, which {WEIGHT_INDEX} names; download it again")
        if name not in found[file]:
            raise ModelError(
                f"{option} {folder}: {file} does not hold {name}, which {WEIGHT_INDEX} says; download both again"
            )
        stored[name] = found[file][name]
    return stored


def _header(path: Path, option: str) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            start = file.read(64)
        for beginning, meaning in _OTHER_FORMATS.items():
            # The ninth byte of safetensors is a brace, whatever length the first eight give.
            if start.startswith(beginning) and start[8:9] != b"{":
                raise ModelError(f"{option}: {path} is {meaning}")
        if not start:
            raise ModelError(f"{option}: {path} is empty; download it again")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: StoredTensor(path.name, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{option}: {path} cannot be read as safetensors, it is truncated or damaged ({in_one_line(error)}); "
            "download it again"
        ) from error


def _weight_map(folder: Path, option: str) -> dict[str, str]:
    path = folder / WEIGHT_INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in names.values()):
            raise TypeError("weight_map names something that is no file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{option}: {path} cannot be read: {type(error).__name__}: {error}; download it again"
        ) from error
    return names


def configured_end_tokens(path: str) -> set[int]:
    """Returns the ids that end a completion according to generation_config.json, which is optional.

    Raises ModelError when the file exists and cannot be read: without it a model might never end a completion.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return set()
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as error:  # transformers raises errors of any type on a damaged file
        raise ModelError(
            f"model.path {path}: generation_config.json cannot be read: {in_one_line(error)}; download it again, or "
            "move it away if the tokenizer's end token is the only one"
        ) from error
    ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(type(token) is int and token >= 0 for token in ends):
        raise ModelError(
            f"model.path {path}: generation_config.json: eos_token_id is {configured!r}; give a token's id or a list "
            "of them"
        )
    return set(ends)


def small_files(path: str) -> dict[str, bytes]:
    """Reads configuration and tokenizer files, which a directory with other weights needs too. Raises OSError."""
    return {
        file.name: file.read_bytes()
        for file in sorted(Path(path).iterdir())
        if file.is_file() and file.suffix in _SMALL_FILES and "index.json" not in file.name
    }


def in_one_line(error: BaseException) -> str:
    """Returns the message of a library's error, which may have paragraphs, as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
