from pathlib import Path

from setuptools import Extension, find_packages, setup

# What each use needs beyond torch. The kernels' tests run in Triton's interpreter, on any machine.
PEFT = ["transformers>=5.3", "peft>=0.21", "accelerate>=1.10", "safetensors>=0.5"]
BENCHMARK = [*PEFT, "matplotlib>=3.8", "scikit-learn>=1.4", "pillow>=10"]
LLAVA = [*BENCHMARK, "pyyaml>=6", "tensorboard>=2.17"]
TEST = [
    *LLAVA,
    "trl>=1.0",
    "datasets>=4",
    "bitsandbytes>=0.48",
    "torchao>=0.15",
    "pytest>=8",
    "hypothesis>=6.100",
    "ruff>=0.14",
    "triton>=3.4; platform_system == 'Linux'",
]

# vLLM's internals change from one minor version to the next; mixlora_kernels/serving/versions.py states what was tested.
VLLM = [*PEFT, "vllm>=0.32,<0.33"]

# The CPU's kernels, where there is a C compiler with OpenMP; the package works without them. Not linked with OpenMP:
# they find torch's, which is loaded first, so that both share one pool of threads.
NATIVE = Path("mixlora_kernels", "backends", "native")
KERNELS = Extension(
    "mixlora_kernels.backends.native._kernels",
    [str(NATIVE / "kernels.c")],
    depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
    extra_compile_args=["-std=gnu11", "-O3", "-fopenmp", "-Wno-psabi"],
    libraries=["m"],
    optional=True,
)

setup(
    name="mixlora_kernels",
    version="0.1.0",
    description="Conditional Mixture-of-LoRA (MixLoRA, ACL 2024), cheaper than plain LoRA",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mixlora_kernels", "mixlora_kernels.*", "integration", "integration.*"]),
    package_data={
        "integration.llava": ["configs/*.yaml", "lmms_tasks/*"],
        "mixlora_kernels.backends.native": ["*.c", "*.h"],
    },
    ext_modules=[KERNELS],
    entry_points={
        "lmms_eval.models": ["mixlora_llava = integration.llava.lmms:manifest"],
        "vllm.general_plugins": ["mixlora = mixlora_kernels.serving.plugin:register"],
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.6"],
    extras_require={"peft": PEFT, "llava": LLAVA, "benchmark": BENCHMARK, "test": TEST, "vllm": VLLM},
)
