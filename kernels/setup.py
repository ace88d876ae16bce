import re
from pathlib import Path

from setuptools import setup

# The file is read, not imported, because a build environment has no torch.
SOURCE = Path(__file__).parent.joinpath("lens_kernels", "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE).group(1)

setup(
    name="lens-kernels",
    version=VERSION,
    description="Token log-probabilities, interference scores and clipped policy losses without a full log-softmax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=["lens_kernels"],
    package_data={"lens_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.8", 'triton; platform_system=="Linux"'],
)
