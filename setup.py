"""Packaging of MegaXELM. The tools' settings are in pyproject.toml.

Install torch first (`pip install torch==2.13.0`): an open range would fetch the newest build with all its CUDA packages.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megaxelm",
    version="0.1.0",
    description="Train, mix and grow Cross-lingual Expert Language Models (X-ELM) with DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megaxelm", "megaxelm.*"]) + find_packages("kernels"),
    package_dir={"megaxelm": "megaxelm", "megaxelm_kernels": "kernels/megaxelm_kernels"},
    package_data={"megaxelm": ["py.typed", "report/*.j2"], "megaxelm_kernels": ["py.typed"]},
    data_files=[
        ("share/megaxelm/ds_configs", sorted(str(path.relative_to(HERE)) for path in (HERE / "ds_configs").glob("*.json"))),
        ("share/megaxelm/recipes", sorted(str(path.relative_to(HERE)) for path in (HERE / "recipes").glob("*.yaml"))),
        ("share/megaxelm/slurm", sorted(str(path.relative_to(HERE)) for path in (HERE / "slurm").glob("*.sbatch"))),
    ],
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "datasets>=4",
        "sentencepiece>=0.2.1",
        "protobuf",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "tensorboard>=2.18",
        "numpy>=1.26",
        "scipy>=1.13",
        "scikit-learn>=1.5",
        "lang2vec>=1.1.2",
        "safetensors>=0.5",
        "pyarrow>=17",
        "zstandard>=0.23",
        "xxhash>=3.4",
        "orjson>=3.10",
        "pydantic>=2.7",
        "pyyaml>=6",
        "typer>=0.12",
        "rich>=13.7",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "ninja>=1.11",
        "datatrove>=0.10.1,<0.11",
        "fsspec>=2023.12.2",
        "py3langid>=0.4",
        "regex",
        "threadpoolctl>=3",
        "setuptools",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "demo": ["django>=5.2", "wagtail>=7", "django-cms>=5", "sphinx>=8", "django-allauth>=65"],
        "eval": ["lm-eval>=0.4.13"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
        "peft": ["peft>=0.17"],
        "scale": ["ray>=2.50", "s3fs>=2023.12.2"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML",
            "types-tqdm",
            "pre-commit>=4",
            "ray>=2.50",
            "k-means-constrained>=0.9",
            "megatron-core>=0.16,<0.17",
            "accelerate>=1.10",
            "lm-eval>=0.4.13",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus-client>=0.20",
            "openai>=1.60",
            "httpx>=0.27",
            "peft>=0.17",
        ],
    },
    entry_points={"console_scripts": ["megaxelm = megaxelm.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
