"""Makes the folder of wheels that is taken along to a GPU machine without a network, and installs it there.

    python -m benchmarks.gpu_session.pack .gpu-pack          # what `make gpu-pack` does
    python -m benchmarks.gpu_session.pack .gpu-pack --pin    # after a version was changed: writes the new hashes

requirements/gpu-pack.txt names the wheels, gpu-target.txt what the machine has, gpu-pack-left-out.txt what neither has,
with the reason. Every need of every wheel must be in one of the three.
"""

import argparse
import email.parser
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_session.running import ROOT

LIMIT_BYTES = 60 << 20
PYTHON = "3.12"
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)), "manylinux2014_x86_64", "manylinux1_x86_64")
"""pip compares these names and not what they mean, so all that the machine can run are listed."""
_INSTALLED = ".pack"
"""The file of an installed pack that says which wheels are in it."""


class PackError(Exception):
    """The pack cannot be made or installed; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of the pack."""

    name: str
    """Normalised, as in `flash-linear-attention`."""
    version: str
    size: int
    sha256: str
    needs: tuple[str, ...]
    """Normalised names of what it requires on the machine, without extras."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The three lists of names that the pack is checked against."""

    pack: Path
    target: frozenset[str]
    left_out: Mapping[str, str]
    """Name -> reason."""


def read_lists(folder: Path) -> Lists:
    """Reads the three files of `folder`. Raises PackError for a name that is left out without a reason."""
    left_out = {}
    for line in _lines(folder / "gpu-pack-left-out.txt"):
        name, _, reason = line.partition("#")
        if not reason.strip():
            raise PackError(f"gpu-pack-left-out.txt: {name.strip()} has no reason; write `{name.strip()}  # why`")
        left_out[normalised(name.strip())] = reason.strip()
    target = frozenset(normalised(re.split(r"[=<>#\s]", line)[0]) for line in _lines(folder / "gpu-target.txt"))
    return Lists(pack=folder / "gpu-pack.txt", target=target, left_out=left_out)


def build(folder: Path, lists: Lists, pin: bool = False) -> list[Wheel]:
    """Downloads the wheels into `folder`, which is replaced as a whole, and checks them.

    Raises PackError if a wheel cannot be had, if a need is in none of the lists, or if they are too large.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu-pack-") as part:
        made = Path(part) / "wheels"
        _download(made, lists.pack, pin)
        wheels = [read_wheel(path) for path in sorted(made.glob("*.whl"))]
        check(wheels, lists)
        if pin:
            lists.pack.write_text(pinned(lists.pack.read_text(), wheels))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return wheels


def _download(folder: Path, requirements: Path, pin: bool) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(without_hashes(requirements.read_text()) if pin else requirements.read_text())
        file.flush()
        hashes = [] if pin else ["--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *hashes, *wanted]
        done = subprocess.run([*command, "-d", folder, "-r", file.name], capture_output=True, text=True)
    if done.returncode:
        raise PackError(f"a wheel of {requirements.name} cannot be had for Python {PYTHON}:\n{done.stderr.strip()}")


def read_wheel(path: Path) -> Wheel:
    """Reads the metadata of a wheel. Needs of extras, of other systems and of other Pythons are left out."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    machine = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": ""}
    machine |= {"platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython"}
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    needs = {normalised(r.name) for r in required if r.marker is None or r.marker.evaluate(machine)}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(normalised(metadata["Name"]), metadata["Version"], path.stat().st_size, digest, tuple(sorted(needs)))


def check(wheels: Sequence[Wheel], lists: Lists) -> None:
    """Raises PackError if a need is in none of the lists, or if the wheels are larger than LIMIT_BYTES."""
    known = {wheel.name for wheel in wheels} | lists.target | set(lists.left_out)
    missing = [f"{wheel.name} needs {need}" for wheel in wheels for need in wheel.needs if need not in known]
    if missing:
        raise PackError(
            f"{'; '.join(missing)}: add the name to gpu-pack.txt, to gpu-target.txt if the machine has it, or to "
            "gpu-pack-left-out.txt with the reason"
        )
    size = sum(wheel.size for wheel in wheels)
    if size > LIMIT_BYTES:
        largest = max(wheels, key=lambda wheel: wheel.size)
        raise PackError(
            f"the wheels have {size / 2**20:.1f} MiB, more than {LIMIT_BYTES >> 20}; the largest is {largest.name}, "
            f"{largest.size / 2**20:.1f} MiB: leave one out, with the reason in gpu-pack-left-out.txt"
        )


def table(wheels: Sequence[Wheel], lists: Lists) -> str:
    """Returns what is in the pack, with sizes, and what is not, with reasons."""
    lines = [f"{wheel.name:28} {wheel.version:12} {wheel.size / 2**20:7.2f} MiB" for wheel in wheels]
    total = sum(wheel.size for wheel in wheels)
    lines.append(f"{'in all':28} {len(wheels):<12} {total / 2**20:7.2f} MiB of {LIMIT_BYTES >> 20}")
    return "\n".join([*lines, "", "left out:", *(f"{name:28} {reason}" for name, reason in lists.left_out.items())])


def without_hashes(text: str) -> str:
    """Returns requirements without their hashes."""
    return re.sub(r"\s*\\\n\s*--hash=\S+|\s+--hash=\S+", "", text)


def pinned(text: str, wheels: Iterable[Wheel]) -> str:
    """Returns requirements with the hashes of `wheels` in place of those that they have."""
    hashes = {wheel.name: wheel.sha256 for wheel in wheels}

    def with_hash(found: re.Match[str]) -> str:
        return f"{found[0]} \\\n    --hash=sha256:{hashes[normalised(found[1])]}"

    return re.sub(r"^([A-Za-z0-9._-]+)==\S+", with_hash, without_hashes(text), flags=re.MULTILINE)


def install(folder: Path, site: Path) -> Path:
    """Installs the wheels of `folder` into `site`, if they are not there already; returns `site`.

    Raises PackError if there are none, or if pip refuses them.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise PackError(
            f"--pack {folder}: no wheels there; run `make gpu-pack` where there is a network and bring the folder "
            "along, or give --no-pack if this Python has all that the trainer and the benchmarks need"
        )
    stamp = "\n".join(f"{wheel.name} {wheel.stat().st_size}" for wheel in wheels)
    mark = site / _INSTALLED
    if mark.is_file() and mark.read_text() == stamp:
        return site
    shutil.rmtree(site, ignore_errors=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PackError(f"pip cannot install the wheels of {folder}:\n{done.stderr.strip()}")
    mark.write_text(stamp)
    return site


def normalised(name: str) -> str:
    """Returns a distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _lines(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="it is replaced")
    parser.add_argument("--pin", action="store_true", help="write the hashes of what is downloaded into gpu-pack.txt")
    parsed = parser.parse_args()
    try:
        lists = read_lists(ROOT / "requirements")
        wheels = build(parsed.folder.absolute(), lists, parsed.pin)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(wheels, lists))
    return 0


if __name__ == "__main__":
    sys.exit(main())
