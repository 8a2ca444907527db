"""What ``launch_path`` times: a layer and a LLaMA's decoder layer under each implementation, on shapes where the way to
the launches takes all the time."""

import time
from collections.abc import Callable, Iterator

import torch
from cases.adapted import adapt_model, use_backend
from cases.implementations import IMPLEMENTATIONS
from cases.problem import Case, Problem, draw_factors
from cases.training import TrainingCase, build_decoder
from torch import Tensor, nn

import mixlora_kernels as mk

from .launches import Recorder

UNITS = {
    "layer": ("base", "peft_lora", "mixlora", "mixlora_tied"),
    "decoder layer": ("base", "peft_lora", "mixlora_single", "mixlora", "mixlora_tied_single", "mixlora_tied"),
}
TRAINING, STEP = "forward+backward", "decoding step"
CPU = torch.device("cpu")
TIMED = 4  # runs in a row
TINY = TrainingCase(
    B=2, L=3, hidden=32, intermediate=64, layers=1, heads=2, vocabulary=8, checkpointing=False, dtype=torch.bfloat16
)  # fmt: skip


class TimedPath:
    """One implementation's path.

    Attributes:
        run: what is timed. reset: is not.
        microseconds: what each run took of its thread's time.
    """

    def __init__(
        self, unit: str, name: str, which: str, dropout: float, run: Callable[[], None], reset: Callable[[], None]
    ):
        self.unit, self.name, self.which, self.dropout = unit, name, which, dropout
        self.run, self.reset = run, reset
        self.microseconds: list[float] = []

    def time(self) -> None:
        """Several runs, the first of which only brings the code back into the caches, as the layer before it does in a
        model."""
        for number in range(1 + TIMED):
            began = time.thread_time_ns()
            self.run()
            taken = time.thread_time_ns() - began
            self.reset()
            if number:
                self.microseconds.append(taken / 1e3)

    def crossings(self) -> int:
        """Calls of the dispatcher beneath autograd, views and allocations included."""
        with Recorder() as recorder:
            self.run()
        self.reset()
        return recorder.crossings


class OneOperation(nn.Module):
    """In the place of a dropout: one operation with a gradient, which it is on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.95


def build_paths(unit: str, name: str, dropout: float, backend: str) -> Iterator[TimedPath]:
    """Training, and without dropout a decoding step as well."""
    build = {"layer": layer, "decoder layer": decoder}[unit]
    yield training(unit, name, dropout, *build(name, dropout, backend))
    if not dropout:
        step, reset = {"layer": layer_step, "decoder layer": decoder_step}[unit](name, backend)
        yield TimedPath(unit, name, STEP, dropout, torch.no_grad()(step), reset)


def training(unit: str, name: str, dropout: float, model: nn.Module, call: Callable[[Tensor], Tensor]) -> TimedPath:
    x = torch.randn(TINY.B, TINY.L, TINY.hidden, dtype=TINY.dtype, requires_grad=True)
    dy = torch.randn_like(call(x))
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def run():
        call(x).backward(dy)

    def reset():
        for leaf in leaves:
            leaf.grad = None

    return TimedPath(unit, name, TRAINING, dropout, run, reset)


def layer(name: str, dropout: float, backend: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """One layer by itself, without a model around it."""
    case = Case(TINY.B, TINY.L, TINY.hidden, TINY.hidden, TINY.dtype, dropout=dropout)
    problem = Problem(case, CPU, seed=0)
    chosen = IMPLEMENTATIONS[name]
    config = chosen.configure(case.config)
    module = chosen.adapt(problem.linear, config, draw_factors(case.d_in, case.d_out, config, CPU))
    use_backend(module, backend)
    if chosen.kind == "lora":
        with_one_operation(module)
    return module.train(), module


def layer_step(name: str, backend: str) -> tuple[Callable[[], object], Callable[[], None]]:
    """A token for each instance, the routing kept."""
    module, call = layer(name, 0.0, backend)
    token = torch.randn(TINY.B, 1, TINY.hidden, dtype=TINY.dtype)
    module.eval()
    if IMPLEMENTATIONS[name].kind != "mixlora":
        return lambda: call(token), lambda: None
    with torch.no_grad():
        _, routing = module(torch.randn(TINY.B, TINY.L, TINY.hidden, dtype=TINY.dtype), return_routing=True)
    context = mk.RoutingContext(routing=routing)
    return lambda: call(token, context), lambda: None


def decoder(name: str, dropout: float, backend: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A LLaMA of one decoder layer, through PEFT as its users have it."""
    plain = build_decoder(TINY, CPU, TINY.dtype, seed=0)
    model = adapt_model(name, plain, mk.MixLoRAConfig(dropout=dropout), seed=0).train()
    use_backend(model, backend)
    if name == "peft_lora":
        with_one_operation(model)
    return model, lambda x: model(inputs_embeds=x, use_cache=False).logits


def decoder_step(name: str, backend: str) -> tuple[Callable[[], object], Callable[[], None]]:
    """A token for each instance after a prompt, which is all that the cache holds before each run."""
    model, _ = decoder(name, 0.0, backend)
    prompt, token = (torch.randn(TINY.B, L, TINY.hidden, dtype=TINY.dtype) for L in (TINY.L, 1))
    model.eval()
    with torch.no_grad():
        cache = model(inputs_embeds=prompt, use_cache=True).past_key_values

    def step():
        model(inputs_embeds=token, past_key_values=cache, use_cache=True)

    return step, lambda: cache.crop(-1)


def with_one_operation(model: nn.Module) -> nn.Module:
    """The model, each dropout in it replaced."""
    for module in model.modules():
        for leaf, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, leaf, OneOperation())
    return model
