"""Batch: what the operation needs to know about the running step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Prompt(NamedTuple):
    """A prompt that the running step prefills. Its tokens are rows start to start + length of the layers' input.
    Routing averages over the tokens in ``pooled`` [length] bool; None: over all of them."""

    start: int
    length: int
    pooled: torch.Tensor | None = None


class Batch:
    """The request of each token in the running step, and the prompts that begin in it. A model's layers share one
    batch.

    Args:
        max_tokens: the most tokens of a step.
        device: of the layers' activations.
        media: the ids of the tokens that routing leaves out of a prompt; empty for none.

    Attributes:
        active: whether a step with requests runs. It is False in vLLM's profiling and warm-up runs.
        prompts: the prompts that the step prefills, of new requests and of requests that were preempted.
        prompt_blocks: [P] int64, the first KV block of each prompt's request.
        blocks: [most tokens of a step] int64, the first KV block of each token's request. All steps use the same
            tensor, as CUDA graphs require.
        num_blocks: the number of vLLM's KV blocks; 0 before vLLM has allocated them.
    """

    def __init__(self, max_tokens: int, device: torch.device, media: Sequence[int] = ()):
        self.media = media
        self.active = False
        self.prompts: list[Prompt] = []
        self.prompt_blocks = torch.zeros(0, dtype=torch.int64, device=device)
        self.blocks = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.num_blocks = 0

    def begin(
        self, starts: np.ndarray, computed: np.ndarray, prompt_lengths: np.ndarray, first_blocks: torch.Tensor,
        ids: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Record the step that is about to run, with R requests.

        Args:
            starts: [R + 1], the index of each request's first token in the step's input, and the number of tokens at
                the end.
            computed: [R], the number of each request's tokens that are in its KV cache.
            prompt_lengths: [R], the number of tokens of each user's prompt, without generated tokens.
            first_blocks: [R] integers, each request's first KV block, on any device.
            ids: [R, ...], the ids of each request's tokens, its prompt's first. They are needed if there are ``media``.

        Raises:
            RuntimeError: the step computes only a part of a prompt.
        """
        device, lengths = self.blocks.device, np.diff(starts)
        first_blocks = first_blocks.to(device, torch.int64)
        self.prompts, begun = [], np.flatnonzero(computed < prompt_lengths)
        for request in begun.tolist():
            start, length, done, prompt = (int(a[request]) for a in (starts, lengths, computed, prompt_lengths))
            # The loader refuses all settings that are known to cut prompts. This check catches unknown ones.
            if done or length < prompt:
                raise RuntimeError(
                    f"a step computes the tokens {done} to {done + length} of a prompt of {prompt}: a MixLoRA adapter "
                    "routes a prompt by the mean of all its tokens, which one step has to compute. Please report "
                    "what cut the prompt: mixlora_kernels.serving.refusals does not know it. The engine stops, "
                    "because its answer would be wrong"
                )
            own = None if ids is None else ids[request, :prompt]
            self.prompts.append(Prompt(start, prompt, self._pooled(own)))
        if self.prompts:
            self.prompt_blocks = first_blocks[torch.from_numpy(begun).to(device, non_blocking=True)]
        repeats, tokens = torch.from_numpy(lengths).to(device, torch.int64, non_blocking=True), int(starts[-1])
        self.blocks[:tokens] = first_blocks.repeat_interleave(repeats, output_size=tokens)
        # Rows that pad a step to the size of a CUDA graph. Their results are not used, but they must read valid state.
        self.blocks[tokens:].zero_()
        self.active = True

    def _pooled(self, ids: np.ndarray | None) -> torch.Tensor | None:
        """The tokens of a prompt that are text, [length] bool; None: all, or there is no text."""
        if not self.media:
            return None
        if ids is None:
            raise RuntimeError("a prompt's token ids are needed to tell its text from its images")
        text = ~np.isin(ids, self.media)
        return torch.from_numpy(text).to(self.blocks.device) if text.any() and not text.all() else None

    def end(self) -> None:
        self.active = False
        self.prompts = []
