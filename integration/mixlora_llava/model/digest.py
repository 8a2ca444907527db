"""A digest of a model and its adapters. Models that answer differently have different digests."""

import dataclasses
import hashlib
import json

import numpy as np
import torch
from torch import nn

# Fields of a configuration that do not change what the model computes.
ABOUT = {
    "_name_or_path", "name_or_path", "transformers_version", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "auto_mapping", "architectures",
}  # fmt: skip


def model_digest(model: nn.Module) -> str:
    """Compute the digest, 32 hexadecimal digits.

    It depends on all weights (name, dtype, shape and values), on the configurations of the model and the adapters, and
    on which adapters are active. Reading 14 GB of weights takes some ten seconds.

    Raises:
        ValueError: a weight is on the meta device, and has no values.
    """
    total = hashlib.sha256(json.dumps(_settings(model), sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # some modules keep settings in their state dict
            total.update(f"{name} {tensor}".encode())
            continue
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no value: load the model before it is asked")
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()[:32]


def tensor_digest(tensor: torch.Tensor) -> str:
    """The digest of one tensor's dtype, shape and values, 32 hexadecimal digits."""
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor).tobytes()).hexdigest()[:32]


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _settings(model: nn.Module) -> dict:
    adapters = getattr(model, "peft_config", {})
    return {
        "model": _essential(model.config.to_dict()) if hasattr(model, "config") else None,
        "adapters": {name: _essential(_as_dict(config)) for name, config in adapters.items()},
        "active": list(getattr(model, "active_adapters", [])) if adapters else [],
        "disabled": any(getattr(module, "disable_adapters", None) is True for module in model.modules()),
    }


def _as_dict(config) -> dict:
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)


def _essential(value):
    if isinstance(value, dict):
        return {str(key): _essential(item) for key, item in value.items() if key not in ABOUT}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_essential(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value) -> str:
    """Text for values that JSON does not know, such as dtypes and enums."""
    return str(value)
