from pathlib import Path

from setuptools import setup

setup(
    name="lens-kernels",
    version="0.1.0",
    description="Token log-probabilities, interference scores and clipped policy losses without a full log-softmax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["lens_kernels"],
    python_requires=">=3.11",
    install_requires=["torch>=2.8", 'triton; platform_system=="Linux"'],
)
