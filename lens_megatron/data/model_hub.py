"""Finds the folder of a model that is named as on the Hugging Face hub: NAME or NAME@REVISION -> folder.

A folder of that path comes first. Else the files of the name are downloaded into the hub's cache, or found there.
"""

import os
import re
from pathlib import Path

from lens_megatron.config import Config
from lens_megatron.data.model_files import ModelError, in_one_line

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?")
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_FOLDERS = ("*/*",)
"""Folders within a repository hold other forms of the same weights."""


def with_local_models(config: Config, *, download: bool = True) -> Config:
    """Returns `config` with `model.path` and `model.reference_path` as folders; unchanged where both are.

    Raises ModelError where a name cannot be downloaded, or without `download` is not in the hub's cache.
    """
    model = config.model
    path = local_model(model.path, download=download)
    reference = model.reference_path and local_model(model.reference_path, "model.reference_path", download=download)
    if (path, reference) == (model.path, model.reference_path):
        return config
    return config.model_copy(update={"model": model.model_copy(update={"path": path, "reference_path": reference})})


def local_model(path: str, option: str = "model.path", *, download: bool = True) -> str:
    """Returns the folder of the model `path`, which may be a name of the hub such as Qwen/Qwen3-0.6B@main.

    A text that cannot be such a name is returned as it is: whoever reads the folder says that it is not there.

    Args:
        option: what the user set, for messages.

    Raises:
        ModelError: there is no folder at `path`, and the hub or its cache has no such model.
    """
    found = _NAME.fullmatch(path)
    if os.path.lexists(path) or found is None:
        return path
    import huggingface_hub  # only where it is needed: it takes a second

    name, revision = found["name"], found["revision"]
    try:
        return huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_FOLDERS),
            local_files_only=not download,
        )
    except Exception as error:  # the network and the hub raise errors of their own types
        raise ModelError(
            f"{option} {path}: there is no folder {Path(path).absolute()}, and the Hugging Face hub gives no model of "
            f"that name ({type(error).__name__}: {in_one_line(error)}); give the path of a model directory, or without "
            f"a network run `hf download {name} --local-dir FOLDER` elsewhere and copy the folder"
        ) from error
