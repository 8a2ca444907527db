import runpy
from pathlib import Path

from setuptools import find_packages, setup

# The version and the oldest tested versions, from a file that imports nothing that may not be installed yet.
VERSIONS = runpy.run_path(str(Path(__file__).with_name("mixlora_kernels") / "versions.py"))


def oldest(name: str) -> str:
    return f"{name}>={VERSIONS['TESTED'][name][0]}"


# What each use needs beyond torch. The kernels' tests run in Triton's interpreter, on any machine.
PEFT = [oldest("transformers"), oldest("peft"), oldest("accelerate"), "safetensors>=0.8"]
BENCHMARK = [*PEFT, "matplotlib>=3.8", "scikit-learn>=1.4", "pillow>=10"]
LLAVA = [*BENCHMARK, "pyyaml>=6", "pydantic>=2.6", "tensorboard>=2.17", "shtab>=1.7"]
TRL = [*PEFT, oldest("trl"), "datasets>=4.7"]
STUDY = [*LLAVA, "mlxtend>=0.23", "scipy>=1.10"]
DOCS = ["sphinx>=8", "furo>=2025.12", "myst-nb>=1.4", "sphinx-copybutton>=0.5"]
TEST = [
    *STUDY,
    *TRL,
    *DOCS,  # CI builds the pages, too
    "bitsandbytes>=0.48",
    "torchao>=0.16",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.14",
    "mypy>=1.18",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    f"{oldest('triton')}; platform_system == 'Linux'",
]

# Not all that serving rests on is public in vLLM: other versions than the tested ones are refused when a server starts.
VLLM = [*PEFT, f"{oldest('vllm')},<={VERSIONS['TESTED']['vllm'][1]}.999"]

EXTRAS = {
    "peft": PEFT,
    "trl": TRL,
    "llava": LLAVA,
    "study": STUDY,
    "benchmark": BENCHMARK,
    "docs": DOCS,
    "test": TEST,
    "vllm": VLLM,
}

setup(
    name="mixlora_kernels",
    version=VERSIONS["__version__"],
    description="Conditional Mixture-of-LoRA (MixLoRA, ACL 2024): a layer, a method for PEFT, and serving with vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["mixlora_kernels", "mixlora_kernels.*"]),
        *find_packages("integration", include=["mixlora_llava", "mixlora_llava.*"]),
    ],
    package_dir={"mixlora_llava": "integration/mixlora_llava"},
    package_data={
        "mixlora_kernels": ["py.typed"],
        "mixlora_llava": ["configs/*.yaml", "accelerate/*.yaml", "lmms/tasks/*"],
    },
    entry_points={
        "console_scripts": ["mixlora = mixlora_llava.command.main:main"],
        "lmms_eval.models": ["mixlora_llava = mixlora_llava.lmms:manifest"],
        "vllm.general_plugins": ["mixlora = mixlora_kernels.serving.plugin:register"],
    },
    # 3.11 runs all of CI. By hand, tests of the layer and of tests/peft: 3.10 with torch 2.6, 3.13 with torch 2.15.
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in ("3.10", "3.11", "3.12", "3.13")),
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=[oldest("torch")],
    extras_require=EXTRAS,
)
