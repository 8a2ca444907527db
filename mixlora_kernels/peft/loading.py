"""Find out whether an adapter is being loaded, and from where.

peft and transformers first inject the layers of a saved adapter, and open its weights afterwards. The code that injects
the layers is not told which weights will follow. To check the weights first, this module finds the running call of the
loading method on the stack, and reads its arguments by their public names. ``registration.check_hooks`` raises an error
if the installed version has other names.
"""

import inspect
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor
from transformers import PreTrainedModel

HUB_OPTIONS = tuple(inspect.signature(hf_hub_download).parameters)


class Loader(NamedTuple):
    """A method that loads adapters, with the names of its parameters and the prefix of a file's keys."""

    owner: type
    name: str
    folder: str
    options: tuple[str, ...]  # parameters that are dictionaries of further arguments
    tensors: str | None
    prefix: str


LOADERS = (
    Loader(PeftModel, "from_pretrained", "model_id", ("kwargs",), None, "base_model.model."),
    Loader(PeftModel, "load_adapter", "model_id", ("kwargs",), None, "base_model.model."),
    Loader(PreTrainedModel, "load_adapter", "peft_model_id", ("kwargs", "adapter_kwargs"), "adapter_state_dict", ""),
)


def _code(loader: Loader) -> CodeType:
    method = inspect.unwrap(getattr(loader.owner, loader.name))
    return getattr(method, "__func__", method).__code__


BY_CODE = {_code(loader): loader for loader in LOADERS}


class Load(NamedTuple):
    """A running call that loads an adapter.

    Attributes:
        loader: the method.
        folder: a local folder, or the name of a repository on the hub; None if tensors were given.
        options: further arguments for the hub, such as subfolder, revision, token and cache_dir.
        tensors: the adapter's weights, if they were given instead of a folder.
    """

    loader: Loader
    folder: str | None
    options: dict[str, Any]
    tensors: dict[str, Tensor] | None

    def find_weights(self) -> Path:
        """Find the file that the weights will be loaded from. The order of candidates is that of peft and transformers.

        Raises:
            ValueError: a local folder has no weights, or tensors were given instead of a folder.
            EntryNotFoundError: the repository on the hub has no weights.
        """
        if self.folder is None:
            raise ValueError(f"{self.loader.name} was given tensors, and no folder whose weights could be found")
        subfolder = self.options.get("subfolder") or ""
        local = Path(self.folder, subfolder)
        names = [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME]
        if self.loader.owner is PreTrainedModel and self.options.get("use_safetensors") is False:
            names.reverse()
        for name in names:
            if (local / name).exists():
                return local / name
        if (local / CONFIG_NAME).exists():
            raise ValueError(
                f"{local} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}, which hold an adapter's weights; "
                "nothing was loaded"
            )
        options = {name: value for name, value in self.options.items() if name in HUB_OPTIONS}
        try:
            return Path(hf_hub_download(self.folder, SAFETENSORS_WEIGHTS_NAME, **options))
        except EntryNotFoundError:
            return Path(hf_hub_download(self.folder, WEIGHTS_NAME, **options))


def running_load(remembered: tuple[str, dict] | None = None) -> Load | None:
    """Find the running call that loads an adapter; None if a new adapter is made.

    Args:
        remembered: the folder and options that the adapter's configuration was read from, if it was read.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None and frame.f_code not in BY_CODE:
            frame = frame.f_back
        if frame is None:
            return None
        loader, given = BY_CODE[frame.f_code], frame.f_locals
        tensors = None if loader.tensors is None else given.get(loader.tensors)
        folder = given.get(loader.folder)
        options: dict[str, Any] = {}
        for name in loader.options:
            options |= given.get(name) or {}
    finally:
        del frame  # else the frame refers to itself, and only the garbage collector frees it
    if remembered is not None and remembered[0] == str(folder):
        options = remembered[1]
    return Load(loader, None if folder is None else str(folder), options, tensors)


def missing_parameters() -> list[tuple[type, str, str]]:
    """The parameters that ``LOADERS`` need and the installed versions lack, as (class, method, parameter)."""
    return [
        (loader.owner, loader.name, parameter)
        for loader in LOADERS
        for parameter in (loader.folder, *loader.options, loader.tensors)
        if parameter and parameter not in inspect.signature(getattr(loader.owner, loader.name)).parameters
    ]
