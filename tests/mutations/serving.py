"""Serving: what is kept of a request, and what is pooled of it."""

from . import Mutation

_SERVING = "mixlora_kernels/serving"
_UPDATE = "tests/serving/test_update.py"

MUTATIONS = [
    Mutation(
        "state: tied pairs are kept by the request's place in the batch", f"{_SERVING}/state.py",
        "self.weight[blocks] = weight.flatten(1)", "self.weight[: len(blocks)] = weight.flatten(1)", _UPDATE,
    ),
    Mutation(
        "state: pairs are kept by the request's place in the batch", f"{_SERVING}/state.py",
        "self.index[blocks] = torch.cat", "self.index[: len(blocks)] = torch.cat", _UPDATE,
    ),
    Mutation(
        "state: every member takes the first one's columns", f"{_SERVING}/state.py",
        "(part + self.offsets).flatten(1)", "(part + 0 * self.offsets).flatten(1)", _UPDATE,
    ),
    Mutation(
        "state: weighted gates are 1", f"{_SERVING}/state.py",
        "choice.gate.flatten(1) * self.scale", "torch.ones_like(choice.gate).flatten(1) * self.scale", _UPDATE,
    ),
    Mutation(
        "batch: a preempted request pools what it had generated", f"{_SERVING}/batch.py",
        "Prompt(start, prompt, ", "Prompt(start, length, ", _UPDATE,
    ),
    Mutation(
        "batch: images are pooled with the text", f"{_SERVING}/batch.py",
        "return torch.from_numpy(text).to(self.blocks.device) if text.any() and not text.all() else None",
        "return None", f"{_UPDATE}::test_a_prompt_is_routed_by_its_text",
    ),
    Mutation(
        "batch: generated tokens count as the prompt's text", f"{_SERVING}/batch.py",
        "if ids is None else ids[request, :prompt]", "if ids is None else ids[request, :length]",
        f"{_UPDATE}::test_a_prompt_is_routed_by_its_text",
    ),
    Mutation(
        "batch: the first piece of a prompt is routed", f"{_SERVING}/batch.py",
        "if done or length < prompt:", "if done:", f"{_UPDATE}::test_a_prompt_in_pieces_stops_the_step",
    ),
    Mutation(
        "batch: a request's tokens are the next one's", f"{_SERVING}/batch.py",
        "first_blocks.repeat_interleave(", "first_blocks.roll(1).repeat_interleave(", _UPDATE,
    ),
    Mutation(
        "operation: a prompt is summed up, not averaged", f"{_SERVING}/op.py", " * (1.0 / len(x))", "", _UPDATE,
    ),
    Mutation(
        "layer: a process adds the update of all of x's columns", f"{_SERVING}/layer.py",
        'p["lora_A"][:, m.columns]', 'p["lora_A"]', "tests/serving/test_tensor_parallel.py",
    ),
    Mutation(
        "layer: a process's logits are of its own columns", f"{_SERVING}/op.py",
        "if layer.group is not None:", "if False:", "tests/serving/test_tensor_parallel.py",
    ),
]  # fmt: skip
