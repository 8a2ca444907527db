"""Batch: what the operation knows of the running step."""

from typing import NamedTuple

import numpy as np
import torch


class Prompt(NamedTuple):
    """A prompt that the running step prefills: its tokens are the rows start to start + length of the layers' input."""

    start: int
    length: int


class Batch:
    """Whose token is whose in the running step, and which prompts begin in it. One for a model, shared by its layers.

    Attributes:
        active: whether a step of requests runs; not in a profiling or warm-up run, whose tokens are nobody's.
        prompts: the prompts that the step prefills, one each for a new request or one that was preempted.
        prompt_blocks: [P] int64, the first KV block of each of them.
        blocks: [most tokens of a step] int64, the first KV block of each token's request. The tensor stays the same
            over all steps, as those in CUDA graphs must.
        num_blocks: KV blocks that vLLM has; 0 as long as it has none.
    """

    def __init__(self, max_tokens: int, device: torch.device):
        self.active = False
        self.prompts: list[Prompt] = []
        self.prompt_blocks = torch.zeros(0, dtype=torch.int64, device=device)
        self.blocks = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.num_blocks = 0

    def begin(
        self, starts: np.ndarray, computed: np.ndarray, prompt_lengths: np.ndarray, first_blocks: torch.Tensor
    ) -> None:
        """Note the step that is about to run, of R requests.

        Args:
            starts: [R + 1], where each request's tokens begin in the step's input, and their number.
            computed: [R], tokens of the request that are in its KV cache already.
            prompt_lengths: [R], tokens of the prompt as the user gave it, without any that were generated.
            first_blocks: [R] integers, the request's first KV block; on any device, and read on the batch's.

        Raises:
            RuntimeError: a prompt comes in pieces.
        """
        device, lengths = self.blocks.device, np.diff(starts)
        first_blocks = first_blocks.to(device, torch.int64)
        self.prompts, begun = [], np.flatnonzero(computed < prompt_lengths)
        for request in begun.tolist():
            start, length, done, prompt = (int(a[request]) for a in (starts, lengths, computed, prompt_lengths))
            # The loader has refused all that is known to cut prompts; this is the last line.
            if done or length < prompt:
                raise RuntimeError(
                    f"a step computes the tokens {done} to {done + length} of a prompt of {prompt}: a MixLoRA adapter "
                    "routes a prompt by the mean of all its tokens, which one step has to compute. What cut the prompt "
                    "is not known to mixlora_kernels.serving.refusals, please report it; the engine stops here rather "
                    "than answer wrongly"
                )
            self.prompts.append(Prompt(start, prompt))
        if self.prompts:
            self.prompt_blocks = first_blocks[torch.from_numpy(begun).to(device, non_blocking=True)]
        repeats, tokens = torch.from_numpy(lengths).to(device, torch.int64, non_blocking=True), int(starts[-1])
        self.blocks[:tokens] = first_blocks.repeat_interleave(repeats, output_size=tokens)
        # Rows that pad a step to the size of a graph: nobody reads them, but the state they read has to be there.
        self.blocks[tokens:].zero_()
        self.active = True

    def end(self) -> None:
        self.active = False
        self.prompts = []
