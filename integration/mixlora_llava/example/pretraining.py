"""Train the model that the example tunes, from scratch. It takes the role of LLaVA after stage one."""

from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from ..data.dataset import IGNORED, Collator, Conversations, Encoder
from ..model import small
from ..training.train import LlavaTrainer
from . import digits


def pretrain(folder: Path, steps: int, template: str) -> None:
    """Train the base model: first the vision tower; then, with the tower frozen, the rest on captions and on
    reading."""
    model, processor = small.small_llava(digits.texts())
    data = Conversations.read(folder / "data/pretraining.json", folder / "data/images", Encoder(processor, template))
    set_seed(0)
    pretrain_tower(model.model.vision_tower, data, steps)
    model.model.vision_tower.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=str(folder / "pretraining"), max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.05, logging_steps=50, save_strategy="no",
        report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    collator = Collator(processor.tokenizer.pad_token_id)
    LlavaTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    small.save(model.eval(), processor, folder / "base")


def pretrain_tower(tower: torch.nn.Module, data: Conversations, steps: int) -> None:
    """Train the vision tower to predict the words of an image's caption. This takes the role of CLIP's pretraining."""
    items = [data[index] for index, record in enumerate(data.records) if record.image is not None]
    pixels = torch.cat([item["pixel_values"] for item in items])  # [N, 3, 16, 16]
    words = torch.zeros(len(items), len(data.encoder.tokenizer))
    for row, item in zip(words, items):
        row[item["labels"][item["labels"] != IGNORED]] = 1
    head = torch.nn.Linear(tower.config.hidden_size, words.shape[1])
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    tower.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(items), (64,))
        logits = head(tower(pixels[rows]).last_hidden_state[:, 1:].mean(1))
        target = words[rows] / words[rows].sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
