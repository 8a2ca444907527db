"""Encode questions and answers as token ids, for training and for generating.

Texts are few and short, so that each is tokenized once. Pictures are pixels. A model gets the same input as from
LLaVA's
processor: the template ``bare``, with the image's tokens at its position.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..data.conversation import IMAGE
from ..data.dataset import IGNORED
from ..model.generate import build_prompt

TEMPLATE = "bare"
LONGEST = 5  # tokens of an answer, with its end


class Talk:
    """Encodes questions and answers, and makes batches of them.

    Args:
        tokenizer: the model's tokenizer.
        image_tokens: the number of tokens of an image.
    """

    def __init__(self, tokenizer, image_tokens: int):
        self.tokenizer, self.image_tokens = tokenizer, image_tokens
        self._ids: dict[str, list[int]] = {}

    def prompt(self, question: str, image: bool) -> list[int]:
        """The tokens of a question's prompt."""
        text = build_prompt(question, TEMPLATE, image)
        if text not in self._ids:
            self._ids[text] = self._cut(text.replace(IMAGE, IMAGE * self.image_tokens))
        return self._ids[text]

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer and its end."""
        if text not in self._ids:
            self._ids[text] = [*self._cut(text)[1:], self.tokenizer.eos_token_id]
        return self._ids[text]

    def _cut(self, text: str) -> list[int]:
        ids = self.tokenizer(text).input_ids
        if self.tokenizer.unk_token_id in ids:
            raise ValueError(f"the model's vocabulary lacks a word of {text!r}")
        return ids

    def training(self, asked: Iterable[str], answers: Iterable[str], pixels: Tensor | None = None) -> dict[str, Tensor]:
        """A batch padded on the right, with labels on the answers."""
        prompts = [self.prompt(question, pixels is not None) for question in asked]
        said = [self.answer(text) for text in answers]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, said))
        ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(prompts), length), IGNORED)
        mask = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, (prompt, answer) in enumerate(zip(prompts, said)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
            mask[row, :end] = 1
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return found if pixels is None else found | {"pixel_values": pixels}

    def asking(self, asked: Sequence[str], pixels: Tensor) -> dict[str, Tensor]:
        """A batch of prompts of the same length, without padding.

        Raises:
            ValueError: the prompts have different lengths.
        """
        prompts = [self.prompt(question, True) for question in asked]
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("the prompts of a batch must be of one length")
        ids = torch.tensor(prompts)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    @torch.inference_mode()
    def answers(self, model: nn.Module, asked: Sequence[str], pixels: Tensor) -> list[str]:
        """Generate greedily for prompts of the same length."""
        inputs = self.asking(asked, pixels)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=LONGEST, pad_token_id=self.tokenizer.pad_token_id
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def lengths(self, asked: Sequence[str]) -> dict[int, list[int]]:
        """The questions by the length of their prompts."""
        found: dict[int, list[int]] = {}
        for number, question in enumerate(asked):
            found.setdefault(len(self.prompt(question, True)), []).append(number)
        return found
