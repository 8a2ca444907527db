"""Pass the arguments of a model's forward to the adapted layers, which get hidden states alone.

All layers of a model share one ``SideInformation``. Hooks on the model and its decoder record the running forward
there, separately for each thread, so that several threads can run one model. Activation checkpointing runs a layer
again during the backward: after its forward has ended, perhaps after another forward, and perhaps in another thread.
Therefore each checkpointing function is wrapped, and remembers the forward in which it was called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ..routing import Routing
from .balance import add_balance_loss
from .cache import find_cache, find_past
from .forward_pass import ForwardPass
from .media import media_ids
from .model_inputs import ModelInputs, by_name, grows, uncached_ids
from .recorded import Recorded, detach
from .running import EachThread, Running
from .siblings import expect_families
from .targets import find_decoders

if TYPE_CHECKING:
    from .layer import MixLoRALayer

# The attributes in which transformers and torch keep the function that checkpoints a layer.
CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class SideInformation:
    """What the layers of one model know about the batch.

    It holds no module. A layer can therefore be copied without its model, and a copy of a model gets its own copy of
    this. The running forwards are not copied.

    Attributes:
        groups_siblings: whether layers that read the same x are computed together. False: each layer is computed alone,
            with the same bits.
    """

    def __init__(self) -> None:
        self.groups_siblings = True
        self._last: dict[tuple[str, str], Recorded] = {}
        self.decoder_paths: tuple[str, ...] = ()
        self._generates = True
        self._media_ids: tuple[int, ...] | str = ()
        self._expects_families = False
        self._handles: list = []
        self._each_thread = EachThread()

    @property
    def last(self) -> dict[tuple[str, str], Routing]:
        """The detached routings of the last forward that ended in any thread, by (layer, adapter)."""
        return {place: recorded.single() for place, recorded in self._last.items()}

    @property
    def running(self) -> Running:
        """The forwards that this thread runs."""
        return self._each_thread.running

    @property
    def forward_pass(self) -> ForwardPass | None:
        """The decoder's forward that this thread runs; None if it runs none."""
        return self._each_thread.running.forward_pass

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_each_thread"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._expects_families = False  # a copy's layers have no families yet
        self._each_thread = EachThread()

    def install(self, model: nn.Module) -> None:
        """Register hooks on the model and its decoder. Further calls change nothing."""
        self._expects_families = False
        if self._handles:
            return
        decoders = find_decoders(model)
        self.decoder_paths = tuple(name for name, module in model.named_modules() if module in decoders and name)
        # Labels of a model that cannot generate (a classifier, a reward model) are no answers.
        can_generate = getattr(model, "can_generate", None)
        self._generates = can_generate is None or can_generate()
        self._media_ids = media_ids(getattr(model, "config", None))
        add = self._handles.append
        add(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        for decoder in decoders:
            enter = self._enter_decoder if decoder is decoders[0] else self._enter_encoder
            add(decoder.register_forward_pre_hook(enter, with_kwargs=True))
            add(decoder.register_forward_hook(self._leave_decoder, with_kwargs=True, always_call=True))
        add(model.register_forward_hook(self._leave_model, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check_outside(self, layer: "MixLoRALayer") -> None:
        """Refuse to train a decoder's layer outside the decoder's forward.

        It happens if a checkpointing function that this module does not know recomputes the layer. The instances, and
        with them the gradients, would silently be wrong.
        """
        if layer.training and torch.is_grad_enabled() and layer.key.startswith(self.decoder_paths or ("\0",)):
            raise RuntimeError(
                f"{layer.key} runs outside the decoder's forward, so that MixLoRA cannot tell which tokens belong to "
                "an instance. To checkpoint activations, use model.gradient_checkpointing_enable()"
            )

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel is not supported: use DistributedDataParallel (torchrun or accelerate launch)"
            )
        named, running = by_name(module, args, kwargs), self.running
        task, task_mask = running.task
        given = "task_embedding" in kwargs
        if given:
            kwargs = dict(kwargs)
            task, task_mask = kwargs.pop("task_embedding"), kwargs.pop("task_mask", None)
        ids = uncached_ids(named, module.training)
        inputs = ModelInputs(
            named.get("labels"), named.get("logits_to_keep"), task, task_mask, self._generates, self._media_ids,
            named.get("input_ids"), named.get("num_items_in_batch"), grows(ids, running.uncached), not given,
        )  # fmt: skip
        running.enter(inputs)
        running.uncached = ids
        return args, kwargs

    def _leave_model(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        inputs, passes = self.running.leave()
        return output if inputs is None or output is None else add_balance_loss(output, passes, inputs)

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._enter(module, args, kwargs, self.running.inputs)

    def _enter_encoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = self.running.inputs
        if inputs is not None:  # all of the encoder's tokens are prompt; the labels belong to the decoder
            inputs = ModelInputs(
                task=inputs.task, task_mask=inputs.task_mask, generates=False, media_ids=inputs.media_ids,
                input_ids=inputs.input_ids, repeats_task=inputs.repeats_task,
            )  # fmt: skip
        self._enter(module, args, kwargs, inputs)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict, inputs: ModelInputs | None) -> None:
        named, running = by_name(module, args, kwargs), self.running
        tokens = named.get("inputs_embeds")
        tokens = named.get("input_ids") if tokens is None else tokens
        shape = None
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            shape = tokens.shape[0], tokens.shape[1]
        if inputs is None:  # called without the whole model
            task, task_mask = running.task
            inputs = ModelInputs(
                task=task, task_mask=task_mask, generates=self._generates, media_ids=self._media_ids,
                input_ids=named.get("input_ids"),
            )  # fmt: skip
        past = find_past(named, None if shape is None else shape[1])
        if not self._expects_families:
            expect_families(layer for layer in module.modules() if self._knows(layer))
            self._expects_families = True
        running.forward_pass = ForwardPass(shape, named, inputs, module.training, past)
        if running.inputs is not None:
            running.passes.append(running.forward_pass)
        if module.training and torch.is_grad_enabled():
            self._guard_checkpoints(module)

    def _knows(self, module: nn.Module) -> "TypeGuard[MixLoRALayer]":
        """Whether the module is a layer that shares this object."""
        return vars(module).get("side") is self

    def _leave_decoder(self, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        running = self.running
        forward_pass = running.forward_pass
        if running.inputs is None:  # called without the whole model
            running.forward_pass = None
        if forward_pass is None:
            return
        forward_pass.siblings.end()
        if output is None:
            return
        if forward_pass.routings:
            self._last = detach(forward_pass.routings)
        if forward_pass.past.length or forward_pass.shape is None:
            forward_pass.past.note_step(forward_pass.L)
            return
        cache = forward_pass.past.cache
        if cache is None:  # the decoder may have made one
            parts = output if isinstance(output, tuple) else output.values() if isinstance(output, dict) else ()
            cache = find_cache(parts)
        if cache is not None:
            forward_pass.keep_routing(cache)

    def _guard_checkpoints(self, decoder: nn.Module) -> None:
        """Wrap the checkpointing functions below a decoder.

        It runs in every forward, because checkpointing can be switched on at any time. It skips the inside of adapted
        layers, and is faster than ``nn.Module.modules``.
        """
        waiting: list[nn.Module] = [decoder]
        while waiting:
            attributes = vars(waiting.pop())
            if attributes.get("side") is self:
                continue
            for name in CHECKPOINT_ATTRIBUTES:
                function = attributes.get(name)
                if function is not None and not isinstance(function, RestoringCheckpoint):
                    attributes[name] = RestoringCheckpoint(self, function)
            waiting += [child for child in attributes["_modules"].values() if child is not None]


class RestoringCheckpoint:
    """A checkpointing function whose recomputation uses the forward of its call, in whichever thread it runs."""

    def __init__(self, side: SideInformation, function: Callable):
        self.side, self.function = side, function

    def __call__(self, layer: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.function(_WithinPass(self.side, self.side.forward_pass, layer), *args, **kwargs)


class _WithinPass:
    def __init__(self, side: SideInformation, forward_pass: ForwardPass | None, layer: Callable):
        self.side, self.forward_pass, self.layer = side, forward_pass, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.side.running
        before, running.forward_pass = running.forward_pass, self.forward_pass
        try:
            return self.layer(*args, **kwargs)
        finally:
            running.forward_pass = before
            if self.forward_pass is not None:
                self.forward_pass.siblings.clear()


@contextmanager
def task_embedding(model: nn.Module, embedding: Tensor, mask: Tensor | None = None) -> Iterator[None]:
    """Give a task embedding to every forward that this thread runs within the block.

    Use it to generate with ``routing="task"``. Other threads do not get the embedding, so enter the block in the thread
    that runs the model.

    Args:
        model: an adapted model, as a ``PeftModel`` or with injected adapters.
        embedding: [B, d_task] or [B, T, d_task]. It is repeated automatically for beams and returned sequences.
        mask: [B, T], the tokens of the embedding that its mean runs over.

    Raises:
        ValueError: ``model`` has no MixLoRA layers.
    """
    running = find_side_information(model).running
    before, running.task = running.task, (embedding, mask)
    try:
        yield
    finally:
        running.task = before


def find_side_information(model: nn.Module) -> SideInformation:
    """Return the side information that the model's layers share.

    Raises:
        ValueError: the model has no adapted layers.
    """
    for module in model.modules():
        if isinstance(side := vars(module).get("side"), SideInformation):
            return side
    raise ValueError(f"{type(model).__name__} has no MixLoRA layers")
