"""A small LLaVA as something to be measured: a training step and a generation under each implementation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.measure import Candidate
from torch import Tensor, nn

from . import check
from .adapted import adapt_model
from .llava import build_model, build_processor, read_conversations
from .problem import Shaped, dtype_name
from .training import Training, find_gradients

SMALL_MODEL = {"pixels": 56, "hidden": 128, "layers": 2, "new_tokens": 4}


@dataclass(frozen=True)
class ModelCase(Shaped):
    """A LLaVA of so many decoder layers of width ``hidden`` for photographs of pixels × pixels; see ``Case``."""

    pixels: int = 168
    hidden: int = 512
    layers: int = 2
    new_tokens: int = 8
    dtype: torch.dtype = torch.float32
    E: int = 16
    r: int = 4

    @property
    def name(self) -> str:
        return f"LLaVA {self.layers}×{self.hidden}, {self.pixels} pixels, {dtype_name(self.dtype)}"


class Generation(Candidate):
    """Greedy generation from prompts with a photograph, always so many tokens.

    Args:
        exact: the model in float32, and in float64 with the same function through the reference; with what turns the
            inputs into its dtype.
    """

    def __init__(self, name: str, case: ModelCase, model: nn.Module, prompts: dict[str, Tensor], exact: Callable):
        super().__init__(name, case, {"generation": lambda: self.generate(model, prompts)})
        self.prompts, self.exact = prompts, exact

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: dict[str, Tensor]) -> Tensor:
        """[B, prompt + new_tokens]"""
        length = {"min_new_tokens": self.case.new_tokens, "max_new_tokens": self.case.new_tokens}
        return model.eval().generate(**prompts, **length, do_sample=False)

    def errors(self) -> dict[str, float]:
        """The share of tokens that differ, in float32, from those generated in float64; none may."""
        got, want = (
            self.generate(self.exact(dtype), feed(self.prompts, dtype)) for dtype in (torch.float32, torch.float64)
        )
        differing = (got != want).float().mean().item()
        check.require_agreement({"tokens": differing}, 0.0, f"{self.name} in generating with {self.case.name}")
        return {"generation": differing}


def feed(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs for a model in ``dtype``."""
    return {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}


def adapted(name: str, case: ModelCase, plain: nn.Module, dtype: torch.dtype, seed: int, exact: bool) -> nn.Module:
    """The model under one implementation, all frozen but the adapters and the multimodal projector, which LLaVA trains
    in full. ``exact``: the same function through the package's reference, to compare with."""
    model = adapt_model(name, copy.deepcopy(plain).to(dtype), case.config, seed, exact)
    for parameter_name, parameter in model.named_parameters():
        if "multi_modal_projector" in parameter_name:
            parameter.requires_grad_(True)
    return model.to(dtype) if exact else model


def build_models(
    case: ModelCase, names: list[str], device: torch.device, seed: int, report: Callable[[str], None]
) -> list[Training | Generation]:
    """The candidates: a training step and a generation under each implementation of that name."""
    processor = build_processor(case.pixels)
    conversations = read_conversations(processor, device)
    plain = build_model(processor, case.pixels, case.hidden, case.layers, device, seed)
    inputs, prompts = (feed(part, case.dtype) for part in conversations)
    candidates = []
    for name in names:

        def exact(dtype: torch.dtype, name: str = name) -> nn.Module:
            return adapted(name, case, plain, dtype, seed, exact=dtype == torch.float64)

        def gradients(dtype: torch.dtype, exact: Callable = exact) -> dict[str, Tensor]:
            return find_gradients(exact(dtype), feed(conversations.training, dtype))

        model = adapted(name, case, plain, case.dtype, seed, exact=False)
        candidates.append(Training(name, case, model, inputs, ("training step",), gradients))
        candidates.append(Generation(name, case, model, prompts, exact))
    return candidates
