"""Package metadata. Extras: `train`, `eval` (COCO's metrics), `demo` (plots and the web page), `deploy` (ONNX, int8),
`docs` (the site) and `test`."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_tdd/__init__.py").read_text(), re.MULTILINE)[1]

TRAIN = [
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "matplotlib>=3.9",
    "peft>=0.21",
    "pyyaml>=6.0",
    "ruamel.yaml>=0.18",
    "scikit-learn>=1.5",
    "tensorboard>=2.20",
    "tqdm>=4.66.3",
]
EVAL = ["pycocoevalcap>=1.2"]
DEMO = ["gradio>=6.30", "matplotlib>=3.9", "psutil>=6.0"]
DEPLOY = ["onnx>=1.20", "onnxruntime>=1.20", "onnxscript>=0.6", "torchao>=0.18"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
TOOLS = [
    "build>=1.2.1",
    "hypothesis>=6.100",
    "mypy>=2.0",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "ruff>=0.12",
    "setuptools>=77.0.3",
    "types-PyYAML>=6.0",
]
TEST = [*TRAIN, *EVAL, *DEMO, *DEPLOY, *DOCS, *TOOLS]

setup(
    name="modeling_tdd",
    version=VERSION,
    description="In-Situ Tweedie Discrete Diffusion (TDD) for Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2510.01047"},
    packages=find_packages(include=["modeling_tdd", "modeling_tdd.*"]),
    # Beside the package, which loads PyTorch when it is imported: `tdd --help` does not
    py_modules=["tdd_cli"],
    entry_points={"console_scripts": ["tdd = tdd_cli:main"]},
    package_data={
        "modeling_tdd": ["py.typed"],
        "modeling_tdd.evaluation": ["metrics/*/*.py"],
        "modeling_tdd.publishing": ["card_template.md"],
    },
    python_requires=">=3.11",
    install_requires=[
        "huggingface_hub>=2.2",
        "numpy>=2.0",
        "pillow>=12.1.1",
        "safetensors>=0.8",
        "timm>=1.0.31",
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.23,<6",
    ],
    extras_require={"train": TRAIN, "eval": EVAL, "demo": DEMO, "deploy": DEPLOY, "docs": DOCS, "test": TEST},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
