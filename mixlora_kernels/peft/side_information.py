"""How what a model is given reaches the adapted layers, which see hidden states alone.

Hooks on the model and on its decoder note the running forward in one object that all layers of the model share.
Activation checkpointing runs a layer a second time, when that forward is long over and perhaps another came after
it; so each checkpointing function is wrapped to remember, at the call, the forward it belongs to.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..routing import Routing
from .forward import Call, Forward, KeptRouting

# Where transformers and torch keep the function that checkpoints a layer.
CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class SideInformation:
    """What the layers of one model know about the batch.

    It holds no module, so that a layer can be copied without the model, and a model with its own copy of this.

    Attributes:
        forward: the running forward of the decoder; None outside of one.
        last: the routings of the last forward by (layer, adapter), detached.
        task: a task embedding and its mask for every forward, set by ``task_embedding``.
    """

    def __init__(self):
        self.forward: Forward | None = None
        self.last: dict = {}
        self.task: tuple[Tensor | None, Tensor | None] = (None, None)
        self.decoder_paths: tuple[str, ...] = ()
        self._call: Call | None = None
        self._handles: list = []

    def install(self, model: nn.Module) -> None:
        """Hook the model and its decoder; once, however often it is called."""
        if self._handles:
            return
        decoders = find_decoders(model)
        self.decoder_paths = tuple(name for name, module in model.named_modules() if module in decoders and name)
        add = self._handles.append
        add(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        for decoder in decoders:
            add(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
            add(decoder.register_forward_hook(self._leave_decoder, with_kwargs=True, always_call=True))
        add(model.register_forward_hook(self._leave_model, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check_outside(self, layer: nn.Module) -> None:
        """Refuse to train a decoder's layer outside of the decoder's forward.

        It happens where something recomputes the layer that this module does not know of; its instances, and with
        them the gradients, would be wrong without a word.
        """
        if layer.training and torch.is_grad_enabled() and layer.key.startswith(self.decoder_paths or ("\0",)):
            raise RuntimeError(
                f"{layer.key} runs outside of the decoder's forward, so that it cannot be known which tokens belong to "
                "an instance. To checkpoint activations, use model.gradient_checkpointing_enable()"
            )

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict):
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel runs its replicas in threads that would share one batch's routing: use "
                "DistributedDataParallel (torchrun or accelerate launch)"
            )
        named = _by_name(module, args, kwargs, ("labels", "logits_to_keep"))
        task, task_mask = self.task
        if "task_embedding" in kwargs:
            kwargs = dict(kwargs)
            task, task_mask = kwargs.pop("task_embedding"), kwargs.pop("task_mask", None)
        self.forward = None
        self._call = Call(named.get("labels"), named.get("logits_to_keep"), task, task_mask)
        return args, kwargs

    def _leave_model(self, _module, _args, _output) -> None:
        self.forward = self._call = None

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = _by_name(module, args, kwargs, ("input_ids", "inputs_embeds", "attention_mask", "position_ids"))
        tokens = named.get("inputs_embeds")
        tokens = named.get("input_ids") if tokens is None else tokens
        shape = tokens.shape[:2] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None
        cache = named.get("past_key_values")
        kept = getattr(cache, KeptRouting.ATTRIBUTE, None)
        cached = _cached_tokens(cache, kept, shape)
        call = self._call or Call(task=self.task[0], task_mask=self.task[1])
        self.forward = Forward(shape, named, call, module.training, cached, kept)
        if module.training and torch.is_grad_enabled():
            self._guard_checkpoints(module)

    def _leave_decoder(self, _module, _args, kwargs: dict, output) -> None:
        forward = self.forward
        if self._call is None:  # called without the whole model
            self.forward = None
        if forward is None or output is None or not forward.routings:
            return
        self.last = {
            place: Routing(*(tensor.detach() if tensor.requires_grad else tensor for tensor in routing))
            for place, routing in forward.routings.items()
        }
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None and not forward.cached and forward.L is not None:
            prompt = forward.L - max(forward.keep - 1, 0)
            setattr(cache, KeptRouting.ATTRIBUTE, KeptRouting(prompt, forward.routings))

    def _guard_checkpoints(self, decoder: nn.Module) -> None:
        for module in decoder.modules():
            for attribute in CHECKPOINT_ATTRIBUTES:
                function = vars(module).get(attribute)
                if function is not None and not isinstance(function, RestoringCheckpoint):
                    setattr(module, attribute, RestoringCheckpoint(self, function))


class RestoringCheckpoint:
    """A checkpointing function whose recomputation sees the forward it belongs to."""

    def __init__(self, side: SideInformation, function):
        self.side, self.function = side, function

    def __call__(self, layer, *args, **kwargs):
        return self.function(_InForward(self.side, self.side.forward, layer), *args, **kwargs)


class _InForward:
    def __init__(self, side: SideInformation, forward: Forward | None, layer):
        self.side, self.forward, self.layer = side, forward, layer

    def __call__(self, *args, **kwargs):
        running, self.side.forward = self.side.forward, self.forward
        try:
            return self.layer(*args, **kwargs)
        finally:
            self.side.forward = running


@contextmanager
def task_embedding(model: nn.Module, embedding: Tensor, mask: Tensor | None = None):
    """Give every forward within the block a task embedding; the way to generate with ``routing="task"``.

    Args:
        model: an adapted model, as a ``PeftModel`` or with injected adapters.
        embedding: [B, d_task] or [B, T, d_task]; beams and returned sequences repeat it themselves.
        mask: [B, T], the embedding's tokens that count.

    Raises:
        ValueError: ``model`` has no MixLoRA layers.
    """
    side = find_side_information(model)
    before, side.task = side.task, (embedding, mask)
    try:
        yield
    finally:
        side.task = before


def find_side_information(model: nn.Module) -> SideInformation:
    """What the model's layers share.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(side := vars(module).get("side"), SideInformation):
            return side
    raise ValueError(f"{type(model).__name__} has no MixLoRA layers")


def find_decoders(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward receives the tokens' mask and positions: the text decoder (and the encoder of a
    model that has both); the model itself where it is no transformers model."""
    get_decoder = getattr(model, "get_decoder", None)
    if get_decoder is None:
        return [model]
    decoders = [get_decoder()]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoders.append(model.get_encoder())
    return list(dict.fromkeys(decoders))


def _by_name(module: nn.Module, args: tuple, kwargs: dict, names: tuple[str, ...]) -> dict:
    """A forward's arguments by name; the signature is read only where one of ``names`` may have no name."""
    if not args:
        return kwargs
    parameters = list(inspect.signature(module.forward).parameters)
    if not any(name in parameters[: len(args)] for name in names):
        return kwargs
    return dict(zip(parameters, args)) | kwargs


def _cached_tokens(cache, kept: KeptRouting | None, shape) -> int:
    length = 0 if cache is None or not hasattr(cache, "get_seq_length") else cache.get_seq_length()
    if isinstance(length, Tensor):
        if torch.compiler.is_compiling():
            # A static cache counts on the device. Only single steps are compiled, never a prefill.
            return 0 if kept is None or shape is None or shape[1] != 1 else kept.length + 1
        length = int(length)
    return length
