"""A whole LLaVA as something to be measured: a training step and a generation under each implementation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import check
import torch
from adapted import adapt_model, trained
from llava import Conversations, build_model, build_processor, read_conversations
from measure import Candidate
from problem import dtype_name
from torch import Tensor, nn

import mixlora_kernels as mk

SMALL_MODEL = {"pixels": 56, "hidden": 128, "layers": 2, "new_tokens": 4}

# A float32 error of 1e-5 in one layer passes through the others; within a few layers it stays below ten times that.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ModelCase:
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

    @property
    def product(self) -> "ModelCase":
        return self

    @property
    def config(self) -> mk.MixLoRAConfig:
        return mk.MixLoRAConfig(r=self.r, num_factors=self.E)

    @property
    def fields(self) -> dict:
        shape = dict.fromkeys(("B", "L", "d_in", "d_out"))
        return {"case": self.name, "dtype": dtype_name(self.dtype), **shape, "E": self.E, "r": self.r, "dropout": 0.0}


class Adapted:
    """The model under one implementation.

    Attributes:
        model: all frozen but the adapters and the multimodal projector, which LLaVA trains in full.
    """

    def __init__(
        self, name: str, case: ModelCase, plain: nn.Module, dtype: torch.dtype, seed: int, exact: bool = False
    ):
        """``exact``: the same function through the package's reference, to compare with."""
        model = adapt_model(name, copy.deepcopy(plain).to(dtype), case.config, seed, exact)
        for parameter_name, parameter in model.named_parameters():
            if "multi_modal_projector" in parameter_name:
                parameter.requires_grad_(True)
        self.model = model.to(dtype) if exact else model
        self.dtype = dtype

    def feed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)}

    def loss(self, conversations: Conversations):
        """The model's output in training."""
        self.model.train()
        return self.model(**self.feed(conversations.training), use_cache=False)

    @torch.no_grad()
    def generate(self, conversations: Conversations, new_tokens: int) -> Tensor:
        """Greedily, always so many tokens: [B, prompt + new_tokens]."""
        self.model.eval()
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        return self.model.generate(**self.feed(conversations.prompts), **length, do_sample=False)


class Training(Candidate):
    """Forward, backward and an AdamW step. Its memory includes the optimizer's state."""

    def __init__(self, name: str, case: ModelCase, adapted: Adapted, conversations: Conversations, exact: Callable):
        self.name, self.case, self.adapted, self.conversations, self.exact = name, case, adapted, conversations, exact
        self.optimizer = torch.optim.AdamW([parameter for _, parameter in trained(adapted.model)], lr=1e-5)
        self.phases = {"training step": self.step}

    def reset(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> int:
        return state_bytes(self.optimizer)

    def step(self) -> None:
        self.adapted.loss(self.conversations).loss.backward()
        self.optimizer.step()

    def errors(self) -> dict[str, float]:
        """The largest error of the logits and of all gradients, in float32 whatever the dtype that is timed: below
        it, the rounding of a hidden state may turn a near tie of two factors, and all that follows."""
        got, want = (self._gradients(self.exact(dtype)) for dtype in (torch.float32, torch.float64))
        errors = {name: check.relative_error(value, want[name]) for name, value in got.items()}
        check.require_agreement(errors, TOLERANCE, f"{self.name} in training {self.case.name}")
        return {"training step": max(errors.values())}

    def _gradients(self, adapted: Adapted) -> dict[str, Tensor]:
        output = adapted.loss(self.conversations)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in trained(adapted.model)}
        return {"logits": output.logits.detach()} | gradients


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps of its parameters' history."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


class Generation(Candidate):
    """Greedy generation from a prompt with a photograph."""

    def __init__(self, name: str, case: ModelCase, adapted: Adapted, conversations: Conversations, exact: Callable):
        self.name, self.case, self.adapted, self.conversations, self.exact = name, case, adapted, conversations, exact
        self.phases = {"generation": self.generate}

    def generate(self) -> None:
        self.adapted.generate(self.conversations, self.case.new_tokens)

    def errors(self) -> dict[str, float]:
        """The share of tokens that differ, in float32, from those generated in float64; none may."""
        adapted = (self.exact(dtype) for dtype in (torch.float32, torch.float64))
        got, want = (each.generate(self.conversations, self.case.new_tokens) for each in adapted)
        differing = (got != want).float().mean().item()
        check.require_agreement({"tokens": differing}, 0.0, f"{self.name} in generating with {self.case.name}")
        return {"generation": differing}


def build_models(
    case: ModelCase, names: list[str], device: torch.device, seed: int, report: Callable[[str], None]
) -> list[Training | Generation]:
    """The candidates: a training step and a generation under each implementation of that name."""
    processor = build_processor(case.pixels)
    conversations = read_conversations(processor, device)
    torch.manual_seed(seed)
    plain = build_model(processor, case.pixels, case.hidden, case.layers, device)
    candidates = []
    for name in names:
        adapted = Adapted(name, case, plain, case.dtype, seed)

        def exact(dtype: torch.dtype, name: str = name) -> Adapted:
            return Adapted(name, case, plain, dtype, seed, exact=dtype == torch.float64)

        for kind in (Training, Generation):
            candidates.append(kind(name, case, adapted, conversations, exact))
    return candidates
