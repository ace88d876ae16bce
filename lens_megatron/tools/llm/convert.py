"""Starts the conversion of the GGUF file in a process of its own: gguf/ + wheels/ -> converter/ -> model/.

transformers reads GGUF with the libraries gguf and accelerate, which the trainer does not need. They are installed into
`converter/`, a folder that only the converting process has on its path, so that the environment stays as it is.
"""

import os
import subprocess
import sys
from pathlib import Path

from lens_megatron.tools.llm.fetch import CONVERTER_WHEELS, SMOLLM2, checksum, gguf_file
from lens_megatron.tools.llm.folders import LlmError, LlmFolder, tail, whole_folder

PARAMETERS = 134_515_008
"""The number of parameters of SmolLM2-135M, with the embedding counted once."""


def is_converted(folder: LlmFolder) -> bool:
    """Returns whether the Hugging Face directory is there; it is there whole or not at all."""
    return (folder.model / "config.json").is_file()


def convert(folder: LlmFolder) -> None:
    """Makes `model/`. Raises LlmError where the GGUF file is not there or cannot be converted."""
    file = gguf_file(folder)
    if not file.is_file():
        raise LlmError(f"{file} is not there; run python -m lens_megatron.llm fetch --out {folder.root} first")
    if (found := checksum(file)) != SMOLLM2.sha256:
        raise LlmError(f"{file} is damaged: its SHA-256 is {found}, expected {SMOLLM2.sha256}; run fetch again")
    if not folder.converter.is_dir():
        _install(folder)
    with whole_folder(folder.model) as target:
        run_conversion(file, target, folder.converter)


def run_conversion(file: Path, target: Path, libraries: Path) -> None:
    """Converts `file` into the folder `target` with the libraries in the folder `libraries`. Raises LlmError."""
    source = Path(__file__).resolve().parents[3]
    paths = [str(source), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(libraries)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "lens_megatron.tools.llm.conversion", str(file), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise LlmError(f"{file} cannot be converted: {tail(done.stderr)}; remove its folder, and run fetch again")


def _install(folder: LlmFolder) -> None:
    wheels = [folder.wheels / name for name in CONVERTER_WHEELS]
    if missing := [str(wheel) for wheel in wheels if not wheel.is_file()]:
        raise LlmError(f"{missing[0]} is not there; run python -m lens_megatron.llm fetch --out {folder.root} first")
    with whole_folder(folder.converter) as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
        done = subprocess.run([*command, "--target", str(target), *map(str, wheels)], capture_output=True, text=True)
        if done.returncode:
            raise LlmError(f"pip cannot install {', '.join(map(str, wheels))}: {tail(done.stderr)}; remove them, and "
                           "run fetch again")  # fmt: skip
