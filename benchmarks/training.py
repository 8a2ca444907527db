"""A full training step at the size of LLaVA-7B: its text decoder under each implementation, on one frozen model.

The decoder is given hidden states, as LLaVA gives it embedded words and projected patches, and they require a gradient,
as the projector's output does. The vision tower and the projector are left out: they take every implementation the same
time and would only hide the adapters'.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import check
import torch
from adapted import adapt_model, trained
from measure import Candidate
from model import TOLERANCE, state_bytes
from problem import dtype_name
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mixlora_kernels as mk

SMALL_DECODER = {
    "B": 2, "L": 8, "hidden": 64, "intermediate": 172, "layers": 2, "heads": 1, "vocabulary": 64
}  # fmt: skip


@dataclass(frozen=True)
class TrainingCase:
    """B instances of L tokens through a decoder, LLaVA-7B's unless told otherwise; ``updates``: AdamW's step is part
    of it."""

    B: int = 16
    L: int = 800
    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32064
    checkpointing: bool = True
    updates: bool = True
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    E: int = 16
    r: int = 4

    @property
    def name(self) -> str:
        shape = f"decoder {self.layers}×{self.hidden}, {self.B}×{self.L}, {dtype_name(self.dtype)}"
        return f"{shape}, E {self.E}, r {self.r}, checkpointing {'on' if self.checkpointing else 'off'}"

    @property
    def product(self) -> "TrainingCase":
        return self

    @property
    def config(self) -> mk.MixLoRAConfig:
        return mk.MixLoRAConfig(r=self.r, num_factors=self.E, dropout=self.dropout)

    @property
    def fields(self) -> dict:
        shape = {"B": self.B, "L": self.L, "d_in": None, "d_out": None, "E": self.E, "r": self.r}
        told = {"dropout": self.dropout, "checkpointing": self.checkpointing, "hidden": self.hidden}
        return {"case": self.name, "dtype": dtype_name(self.dtype)} | shape | told

    @property
    def cut(self) -> "TrainingCase":
        """The same widths, in a size that can be computed in float64, and without what is drawn."""
        small = {"L": min(self.L, 64), "layers": min(self.layers, 2), "vocabulary": min(self.vocabulary, 256)}
        return replace(self, B=2, dropout=0.0, **small)


def build_decoder(case: TrainingCase, device: torch.device, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """Frozen random weights, drawn on the device in that dtype."""
    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.heads,
    )  # fmt: skip
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def draw_inputs(case: TrainingCase, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Hidden states [B, L, hidden], a leaf, and the tokens to predict [B, L]."""
    torch.manual_seed(seed)
    hidden = torch.randn(case.B, case.L, case.hidden, device=device).to(dtype).requires_grad_()
    return {"inputs_embeds": hidden, "labels": torch.randint(case.vocabulary, (case.B, case.L), device=device)}


def prepare(model: nn.Module, case: TrainingCase) -> nn.Module:
    """In training, with activations kept or recomputed as the case says."""
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class TrainingStep(Candidate):
    """Forward, backward and an AdamW step. Its memory includes the adapters, their gradients and the optimizer's state,
    and not the frozen model."""

    def __init__(
        self, name: str, case: TrainingCase, model: nn.Module, frozen: nn.Module, device: torch.device, seed: int
    ):
        """``model`` is what ``frozen`` became under this implementation."""
        self.name, self.case, self.model, self.device, self.seed = name, case, prepare(model, case), device, seed
        self.adapters = size(model) - size(frozen)
        self.every = 2 if name == "published" else 1  # it takes several times as long as the others
        self.parameters = [parameter for _, parameter in trained(model)]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=fused) if self.parameters else None
        self.phases = {"forward": self.forward, "forward+backward": self.backward}
        if case.updates:
            self.phases["training step"] = self.update
        self.inputs: dict[str, Tensor] = {}
        self.loss = None

    def reset(self) -> None:
        self.loss = None
        for leaf in (self.inputs["inputs_embeds"], *self.parameters):
            leaf.grad = None

    def held(self) -> int:
        return self.adapters + (state_bytes(self.optimizer) if self.optimizer else 0)

    def forward(self) -> None:
        self.loss = self.model(**self.inputs, use_cache=False).loss

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        if self.optimizer:
            self.optimizer.step()

    def errors(self) -> dict[str, float]:
        """The largest error of the logits, and of all gradients too, on a cut of the model (``TrainingCase.cut``) and
        in float32 whatever the dtype that is timed: below it, the rounding of a hidden state may turn a near tie of two
        factors, and all that follows."""
        case = self.case.cut
        want = self._gradients(case, torch.float64)
        got = self._gradients(case, torch.float32)
        errors = {name: check.relative_error(value, want[name]) for name, value in got.items()}
        check.require_agreement(errors, TOLERANCE, f"{self.name} in training {case.name}")
        return {"forward": errors["logits"]} | dict.fromkeys(list(self.phases)[1:], max(errors.values()))

    def _gradients(self, case: TrainingCase, dtype: torch.dtype) -> dict[str, Tensor]:
        exact = dtype == torch.float64
        model = build_decoder(case, self.device, torch.float32, self.seed).to(dtype)
        model = adapt_model(self.name, model, case.config, self.seed, exact)
        inputs = draw_inputs(case, self.device, dtype, self.seed)
        output = prepare(model.to(dtype), case)(**inputs, use_cache=False)
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in trained(model)}
        return {"logits": output.logits.detach(), "inputs_embeds": inputs["inputs_embeds"].grad} | gradients


def size(model: nn.Module) -> int:
    """Of all parameters, in bytes."""
    return sum(parameter.nbytes for parameter in model.parameters())


def build_steps(
    case: TrainingCase, names: Sequence[str], device: torch.device, seed: int, report: Callable[[str], None]
) -> list[TrainingStep]:
    """A training step under each implementation, all with the same frozen weights and the same batch: the case's, or
    the largest of its halves that fits all of them."""
    plain = build_decoder(case, device, case.dtype, seed)
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    steps = []
    for name in names:
        model = adapt_model(name, copy.deepcopy(plain, dict(shared)), case.config, seed)
        steps.append(TrainingStep(name, case, model, plain, device, seed))
    while not fits(steps, case):
        if case.B == 1:
            raise RuntimeError("not even one instance fits into the device's memory")
        report(f"{case.B} instances are too many for the device's memory; {case.B // 2} are tried")
        case = replace(case, B=case.B // 2)
    return steps


def fits(steps: Sequence[TrainingStep], case: TrainingCase) -> bool:
    """Whether each of the steps can be run on that batch, which they keep."""
    try:
        inputs = draw_inputs(case, steps[0].device, case.dtype, steps[0].seed)
        for step in steps:
            step.case, step.inputs = case, inputs
            for phase in step.phases.values():
                phase()
            step.reset()
        return True
    except torch.OutOfMemoryError:
        pass
    for step in steps:  # outside of the except clause, whose traceback holds tensors
        if step.inputs:
            step.reset()
        step.inputs = {}
    gc.collect()
    torch.cuda.empty_cache()
    return False
