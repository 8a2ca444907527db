"""Estimate the memory and the time that a run needs, by counting, and by timing one batch."""

import math
import time

import torch
from torch import nn

GIB = 2**30


def size(amount: float) -> str:
    """A number of bytes as text."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB / 10 else f"{amount / 2**20:.2f} MiB"


def memory(model: nn.Module, batch: int, tokens: int, checkpointing: bool, activation_bytes: int = 2) -> dict:
    """The memory that a device needs to hold the whole model, in bytes.

    Parameters, gradients and AdamW's two float32 states are exact. Activations are an estimate. With checkpointing they
    are the inputs of all decoder layers and the inner activations of one; without, the inner activations of all layers.
    The logits are added, in the model's precision and as the loss's float32 copy.

    Args:
        model: the patched model. It may be on the meta device.
        batch, tokens: the size of a device's batch, and the tokens of its longest record, with the image's tokens.
    """
    text = model.config.get_text_config()
    d, ffn, layers, rows = text.hidden_size, text.intermediate_size, text.num_hidden_layers, batch * tokens
    # What the backward reads: two norms, q, k, v, the outputs of attention and of the block; gate, up and their
    # product.
    inside = rows * (7 * d + 3 * ffn) * activation_bytes
    activations = inside * (1 if checkpointing else layers)
    if checkpointing:
        activations += layers * rows * d * activation_bytes
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in trainable),
        "optimizer": sum(p.numel() * 8 for p in trainable),
        "activations": activations + rows * text.vocab_size * (activation_bytes + 4),
    }


def operations(model: nn.Module, lengths: list[int], checkpointing: bool) -> float:
    """The floating-point operations of one epoch.

    Each token takes two operations for each parameter of the decoder in the forward, two in the backward through the
    frozen weights, and two more if activations are recomputed. Attention's own products, the adapters and the vision
    tower are not counted; together they are a few percent.
    """
    text = model.config.get_text_config()
    d, ffn = text.hidden_size, text.intermediate_size
    heads = text.num_key_value_heads / text.num_attention_heads
    per_token = text.num_hidden_layers * (d * d * (2 + 2 * heads) + 3 * d * ffn) + d * text.vocab_size
    return 2 * per_token * sum(lengths) * (3 if checkpointing else 2)


def steps(records: int, batch: int, accumulation: int, devices: int, epochs: float) -> int:
    """The number of optimizer steps of a run. The last step of an epoch accumulates the remaining batches."""
    return math.ceil(math.ceil(math.ceil(records / (batch * devices)) / accumulation) * epochs)


def measure(model: nn.Module, batch: dict, device: torch.device, autocast: torch.dtype | None = None) -> dict:
    """Run the forward and backward of a micro-batch twice, and time the second run.

    Afterwards gradients are cleared, and the state of torch's generators is restored.

    Returns:
        ``seconds``, and on a GPU ``peak_bytes``.
    """
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    gpu = device.type == "cuda"
    trained = model.training
    model.train()
    with torch.random.fork_rng(devices=[device.index or 0] if gpu else []):
        for _ in range(2):
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss = model(**batch).loss
            loss.backward()
            if gpu:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
    model.train(trained)
    return {"seconds": seconds} | ({"peak_bytes": torch.cuda.max_memory_allocated(device)} if gpu else {})


def describe(report: dict, needs: dict, total_steps: int, flops: float, tflops: float | None) -> str:
    """The report of ``Patched``, the memory and the time as text for the terminal."""
    share = 100 * report["trainable"] / report["total"]
    kinds = sorted({name.rpartition(".layers.")[2].partition(".")[2] for name in report["modules"]})
    parts = ", ".join(f"{name} {size(amount)}" for name, amount in needs.items())
    lines = [
        f"patched: {len(report['modules'])} linear layers ({', '.join(kinds)})",
        f"trainable: {report['trainable']:,} of {report['total']:,} parameters ({share:.3f} %): adapter "
        f"{report['adapter']:,}, projector {report['projector']:,}",
        f"memory on a device that holds the whole model: {size(sum(needs.values()))} ({parts}; activations of "
        "the longest batch are an estimate)",
        f"steps: {total_steps:,}",
    ]
    if tflops:
        hours = flops / (tflops * 1e12) / 3600
        lines.append(f"time: {hours:.2f} device hours ({flops:.3g} operations at {tflops:g} TFLOP/s as given)")
    else:
        lines.append(f"time: {flops:.3g} operations; the seconds are measured when the training starts")
    return "\n".join(lines)
