"""A whole model's training step as something to be measured, and that of a decoder of LLaVA-7B's size.

The decoder is given hidden states, as LLaVA gives it embedded words and projected patches, and they require a gradient,
as the projector's output does. The vision tower and the projector are left out: they take every implementation the same
time and would only hide the adapters'.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from harness.measure import Candidate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from . import check
from .adapted import adapt_model, trained
from .implementations import IMPLEMENTATIONS
from .problem import Shaped, dtype_name

# A float32 error of 1e-5 in one layer passes through the others; within a few layers it stays below ten times that.
TOLERANCE = 1e-4

SMALL_DECODER = {
    "B": 2, "L": 8, "hidden": 64, "intermediate": 172, "layers": 2, "heads": 1, "vocabulary": 64
}  # fmt: skip


class Training(Candidate):
    """Forward, backward and an AdamW step of a model. Its memory includes the adapters, their gradients and the
    optimizer's state, and not the frozen model.

    Args:
        inputs: the model's arguments, hidden states among them as a leaf or none.
        passes: those that rows tell of, each to the end of which the time is taken.
        gradients: the logits, and the gradients of what is trained, of a model under this implementation in float32,
            and in float64 exactly (see ``errors``).
        adapters: bytes that the model has beyond the frozen one.
    """

    def __init__(
        self, name: str, case: Shaped, model: nn.Module, inputs: dict[str, Tensor], passes: Sequence[str],
        gradients: Callable[[torch.dtype], dict[str, Tensor]], adapters: int = 0,
    ):  # fmt: skip
        self.name, self.case, self.model, self.inputs = name, case, model.train(), inputs
        self.gradients, self.adapters, self.every = gradients, adapters, IMPLEMENTATIONS[name].every
        self.parameters = [parameter for _, parameter in trained(model)]
        fused = any(parameter.is_cuda for parameter in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=fused) if self.parameters else None
        steps = {"forward": self.forward, "forward+backward": self.backward, "training step": self.update}
        self.phases = {which: step for which, step in steps.items() if which in passes}
        if len(passes) == 1:
            self.phases = {passes[0]: self.step}
        self.loss = None

    def reset(self) -> None:
        self.model.train()  # another candidate may generate with it
        self.loss = None
        for leaf in (*self.inputs.values(), *self.parameters):
            leaf.grad = None

    def held(self) -> int:
        states = self.optimizer.state.values() if self.optimizer else ()
        return self.adapters + sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))

    def forward(self) -> None:
        self.loss = self.model(**self.inputs, use_cache=False).loss

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        if self.optimizer:
            self.optimizer.step()

    def step(self) -> None:
        self.forward()
        self.backward()
        self.update()

    def errors(self) -> dict[str, float]:
        """The largest error of the logits, and of all gradients too, in float32 whatever the dtype that is timed: below
        it, the rounding of a hidden state may turn a near tie of two factors, and all that follows."""
        want, got = self.gradients(torch.float64), self.gradients(torch.float32)
        errors = {name: check.relative_error(value, want[name]) for name, value in got.items()}
        check.require_agreement(errors, TOLERANCE, f"{self.name} in training {self.case.name}")
        return dict.fromkeys(self.phases, max(errors.values())) | (
            {"forward": errors["logits"]} if "forward" in self.phases else {}
        )


def find_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits, and the gradients of what is trained and of the inputs that are leaves."""
    output = model.train()(**inputs, use_cache=False)
    output.loss.backward()
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    gradients = {name: leaf.grad for name, leaf in (*trained(model), *leaves.items())}
    return {"logits": output.logits.detach()} | gradients


@dataclass(frozen=True)
class TrainingCase(Shaped):
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
    also = "checkpointing", "hidden"

    @property
    def name(self) -> str:
        shape = f"decoder {self.layers}×{self.hidden}, {self.B}×{self.L}, {dtype_name(self.dtype)}"
        return f"{shape}, E {self.E}, r {self.r}, checkpointing {'on' if self.checkpointing else 'off'}"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "forward+backward", "training step")[: 3 if self.updates else 2]

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


def checkpointed(model: nn.Module, case: TrainingCase) -> nn.Module:
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def build_steps(
    case: TrainingCase, names: Sequence[str], device: torch.device, seed: int, report: Callable[[str], None],
    limited: bool | None = None,
) -> list[Training]:  # fmt: skip
    """A training step under each implementation, all with the same frozen weights and the same batch: the case's, or
    where memory is ``limited``, which it is on a GPU, the largest of its halves that fits all of them."""
    plain = build_decoder(case, device, case.dtype, seed)
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    steps = []
    for name in names:

        def gradients(dtype: torch.dtype, name: str = name) -> dict[str, Tensor]:
            model = build_decoder(case.cut, device, torch.float32, seed).to(dtype)
            model = adapt_model(name, model, case.cut.config, seed, exact=dtype == torch.float64).to(dtype)
            return find_gradients(checkpointed(model, case), draw_inputs(case.cut, device, dtype, seed))

        model = adapt_model(name, copy.deepcopy(plain, dict(shared)), case.config, seed)
        adapters = size(model) - size(plain)
        steps.append(Training(name, case, checkpointed(model, case), {}, case.passes, gradients, adapters))
    fitting, limited = case, device.type == "cuda" if limited is None else limited
    while not fits(steps, fitting, device, seed, limited):
        if fitting.B == 1:
            raise RuntimeError("not even one instance fits into the device's memory")
        report(f"{fitting.B} instances are too many for the device's memory; {fitting.B // 2} are tried")
        fitting = replace(fitting, B=fitting.B // 2)
    return steps


def size(model: nn.Module) -> int:
    """Of all parameters, in bytes."""
    return sum(parameter.nbytes for parameter in model.parameters())


def fits(steps: Sequence[Training], case: TrainingCase, device: torch.device, seed: int, limited: bool) -> bool:
    """Whether each of the steps can be run on that batch, which they keep; tried where memory is limited."""
    try:
        inputs = draw_inputs(case, device, case.dtype, seed)
        for step in steps:
            step.case, step.inputs = case, inputs
            for phase in step.phases.values() if limited else ():
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
