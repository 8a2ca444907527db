"""A whole LLaVA as something to be measured: a training step and a generation under each implementation."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import check
import torch
from implementations import adapt
from llava import PROJECTIONS, Conversations, build_model, build_processor, read_conversations
from peft import LoraConfig, get_peft_model
from problem import draw_factors, dtype_name
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


class Remembering(nn.Module):
    """An adapted layer that keeps the routing of a prompt for the tokens generated from it (decode="prompt").

    A prompt is told from a step by its length, which holds for a plain greedy generation.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.routing = layer, None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.layer(x)
        if x.shape[1] > 1:
            y, self.routing = self.layer(x, return_routing=True)
            return y
        return self.layer(x, mk.RoutingContext(routing=self.routing))


def projections(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the decoder's linear layers are: the module that holds each, and its name there."""
    parents = [parent for block in model.get_decoder().layers for parent in (block.self_attn, block.mlp)]
    return [(parent, leaf) for parent in parents for leaf in PROJECTIONS if hasattr(parent, leaf)]


class Adapted:
    """The model under one implementation.

    Attributes:
        model: all frozen but the adapters and the multimodal projector, which LLaVA trains in full; ``base`` has no
            adapters.
    """

    def __init__(
        self, name: str, case: ModelCase, plain: nn.Module, dtype: torch.dtype, seed: int, exact: bool = False
    ):
        """``exact``: the same function through the package's reference, to compare with."""
        config = case.config
        if name == "published" and exact:
            config = mk.MixLoRAConfig.published(r=case.r, num_factors=case.E)
        model = copy.deepcopy(plain).requires_grad_(False).to(dtype)
        if name.startswith("peft_lora"):
            torch.manual_seed(seed)
            targets = rf".*language_model.*\.({'|'.join(PROJECTIONS)})"
            lora = LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=targets, init_lora_weights=False)
            model = get_peft_model(model, lora, autocast_adapter_dtype=name == "peft_lora")
        elif name != "base":
            for number, (parent, leaf) in enumerate(projections(model)):
                linear = getattr(parent, leaf)
                torch.manual_seed(seed + number)  # what is built in between draws differently
                factors = draw_factors(linear.in_features, linear.out_features, config, linear.weight.device)
                layer = adapt("mixlora" if exact else name, linear, config, factors)
                if exact:
                    layer.backend = "reference"
                setattr(parent, leaf, layer if name == "published" else Remembering(layer))
        for parameter_name, parameter in model.named_parameters():
            if "multi_modal_projector" in parameter_name:
                parameter.requires_grad_(True)
        self.model = model.to(dtype) if exact else model
        self.dtype = dtype

    def trained(self) -> dict[str, nn.Parameter]:
        """By a name that does not depend on how the implementation nests its parameters."""
        named = self.model.named_parameters()
        return {name.replace("adapter.", ""): parameter for name, parameter in named if parameter.requires_grad}

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


class Training:
    """Forward, backward and an AdamW step; see ``measure.Candidate``. Its memory includes the optimizer's state."""

    every = 1

    def __init__(self, name: str, case: ModelCase, adapted: Adapted, conversations: Conversations, exact: Callable):
        self.name, self.case, self.adapted, self.conversations, self.exact = name, case, adapted, conversations, exact
        self.optimizer = torch.optim.AdamW(adapted.trained().values(), lr=1e-5)
        self.phases = {"training step": self.step}

    def reset(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.adapted.loss(self.conversations).loss.backward()
        self.optimizer.step()

    def errors(self) -> dict[str, float]:
        """The largest error of the logits and of all gradients, in float32 whatever the dtype that is timed: below
        it, the rounding of a hidden state may turn a near tie of two factors, and all that follows.

        Raises:
            check.Disagreement: one of them is beyond the tolerance.
        """
        got, want = (self._gradients(self.exact(dtype)) for dtype in (torch.float32, torch.float64))
        errors = {name: check.relative_error(value, want[name]) for name, value in got.items()}
        check.require_agreement(errors, TOLERANCE, f"{self.name} in training {self.case.name}")
        return {"training step": max(errors.values())}

    def _gradients(self, adapted: Adapted) -> dict[str, Tensor]:
        output = adapted.loss(self.conversations)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in adapted.trained().items()}
        return {"logits": output.logits.detach()} | gradients


class Generation:
    """Greedy generation from a prompt with a photograph; see ``measure.Candidate``."""

    every = 1

    def __init__(self, name: str, case: ModelCase, adapted: Adapted, conversations: Conversations, exact: Callable):
        self.name, self.case, self.adapted, self.conversations, self.exact = name, case, adapted, conversations, exact
        self.phases = {"generation": self.generate}

    def reset(self) -> None:
        pass

    def generate(self) -> None:
        self.adapted.generate(self.conversations, self.case.new_tokens)

    def errors(self) -> dict[str, float]:
        """The share of tokens that differ, in float32, from those generated in float64.

        Raises:
            check.Disagreement: there are any.
        """
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
