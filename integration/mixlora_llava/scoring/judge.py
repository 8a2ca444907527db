"""Decide whether a prediction is right with a language model, the judge of Appendix C."""

import re

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..data.conversation import TEMPLATES
from ..model.load import reading
from .exact import EXACT, Judge, exact


def judge_prompt(row: dict) -> str:
    """Appendix C's prompt for one prediction."""
    question = row.get("metadata", {}).get("question", row["prompt"])
    return (
        f"{TEMPLATES['v1'].system} USER: Decide if the prediction is correct given the question and the answer. "
        f"Questions: {question} Answer: {row['target']} Prediction: {row['predict']} "
        "Your response should only be Yes or No. ASSISTANT:"
    )


class LanguageModelJudge:
    """A causal language model as the judge. The paper uses Vicuna 1.5 13B.

    Args:
        model, tokenizer: a model of transformers and its tokenizer.
        batch_size: the number of predictions that are judged at a time.
    """

    def __init__(self, model: nn.Module, tokenizer, batch_size: int = 16):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"

    @torch.inference_mode()
    def __call__(self, rows: list[dict]) -> list[bool | None]:
        verdicts = []
        for start in range(0, len(rows), self.batch_size):
            prompts = [judge_prompt(row) for row in rows[start : start + self.batch_size]]
            batch = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            out = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=4, pad_token_id=self.tokenizer.pad_token_id
            )
            said = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            verdicts += [read_verdict(text) for text in said]
        return verdicts


def read_verdict(text: str) -> bool | None:
    """True for a Yes, False for a No, None for anything else."""
    first = re.match(r"\W*(yes|no)\b", text.lower())
    return None if first is None else first[1] == "yes"


def check_judge(name: str) -> None:
    """Check a judge without its weights, before questions are answered for it.

    Raises:
        ValueError: there is no causal language model with a tokenizer of this name.
    """
    if name == EXACT:
        return
    with reading("judge", name):
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        AutoTokenizer.from_pretrained(name)


def load_judge(name: str, device: str | None = None) -> Judge:
    """Return the exact judge for ``"exact"``, or a language model from a folder or the hub.

    Raises:
        ValueError: see ``check_judge``.
    """
    if name == EXACT:
        return exact
    with reading("judge", name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    return LanguageModelJudge(model.to(device or model.device), tokenizer)
