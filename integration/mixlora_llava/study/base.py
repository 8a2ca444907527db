"""The base model that is tuned: transformers' LLaVA, trained from scratch on captions and on reading, once for all
runs.

LLaVA's stage one starts from a pretrained vision tower and language model. Here both are trained on the pictures of the
training split. The training never asks what a suite asks about a picture: arithmetic occurs only in text.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from ..model import small
from ..model.digest import model_digest
from ..model.load import load_processor
from .pictures import FIELD, INKS, NAMES, ROWS, SIDES, SIZE, Scene, draw, scenes, split
from .suites import CODES, name_of, words
from .talk import Talk

CAPTION = "describe the picture ."
SAID = ("describe the picture . say times ink side row which is",)  # words that the suites do not have


class Recipe(NamedTuple):
    """How the base is trained. Another recipe gives another base."""

    width: int = 256
    vision_width: int = 128
    layers: int = 2
    tower_steps: int = 1500
    steps: int = 1500
    batch: int = 64
    rate: float = 1e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of the base's folder."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:10]


QUICK = Recipe(width=64, vision_width=64, tower_steps=250, steps=350)


class Base(NamedTuple):
    """A trained base.

    Attributes:
        folder: the folder of the model and its processor.
        digest: the digest of its weights, to tell runs of different bases apart.
        seen: the accuracy of its captions, by word, in percent, on the split for choosing learning rates.
    """

    folder: Path
    digest: str
    seen: dict[str, float]

    def load(self) -> tuple[LlavaForConditionalGeneration, Talk]:
        return load(self.folder)


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, Talk]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Talk(load_processor(folder).tokenizer, model.config.image_seq_length)


def make(recipe: Recipe, results: Path) -> Base:
    """Load the base of a recipe from the folder of results, or train it, which takes several minutes.

    Another processor trains another base from the same recipe, because it sums in another order. So the base is kept
    with the results, in half precision: its weights are rounded, and computed with in float32.
    """
    folder = results / f"base-{recipe.key}"
    file = folder / "base.json"
    if not file.is_file():
        started = time.monotonic()
        model, processor = small.small_llava(
            [*words(), *SAID], image=FIELD, patch=SIZE, width=recipe.width, vision_width=recipe.vision_width,
            layers=recipe.layers, seed=recipe.seed,
        )  # fmt: skip
        model.config.image_seq_length = (FIELD // SIZE) ** 2
        talk = Talk(processor.tokenizer, model.config.image_seq_length)
        train_tower(model.model.vision_tower, recipe)
        model.model.vision_tower.requires_grad_(False)
        train_reading(model, talk, recipe)
        small.save(model.half(), processor, folder)
        model, talk = load(folder)
        found = {
            "recipe": recipe._asdict(), "digest": model_digest(model), "seen": caption_accuracy(model, talk),
            "minutes": (time.monotonic() - started) / 60,
        }  # fmt: skip
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    return Base(folder, found["digest"], found["seen"])


def train_tower(tower: nn.Module, recipe: Recipe) -> None:
    """Train the tower to recognise a picture's contents, with digits shifted by up to three pixels. This takes the role
    of CLIP's training."""
    torch.manual_seed(recipe.seed)
    source = np.random.default_rng(recipe.seed)
    sizes = (len(NAMES), len(INKS), len(SIDES), len(ROWS))
    head = nn.Linear(tower.config.hidden_size, sum(sizes))
    tower.train()
    parameters = [*tower.parameters(), *head.parameters()]
    for _ in optimise(parameters, recipe.rate, recipe.tower_steps, decay=0.05):
        shown = scenes(source.choice(split("train"), 2 * recipe.batch), source)
        shifts = torch.from_numpy(source.integers(-3, 4, (len(shown), 2)))
        logits = head(tower(draw(shown, shifts)).last_hidden_state[:, 1:].mean(1)).split(sizes, dim=1)
        target = classes(shown)
        loss = sum(nn.functional.cross_entropy(part, wanted) for part, wanted in zip(logits, target.T))
        loss.backward()
    tower.eval()


def classes(shown: list[Scene]) -> Tensor:
    """The digit, ink, side and row of each picture as numbers, [B, 4]."""
    inks = list(INKS)
    return torch.tensor([[s.digit, inks.index(s.ink), SIDES.index(s.side), ROWS.index(s.row)] for s in shown])


def train_reading(model: LlavaForConditionalGeneration, talk: Talk, recipe: Recipe) -> None:
    """Train the projector and the language model, alternating batches of captions and of reading."""
    source = np.random.default_rng(recipe.seed + 1)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in optimise(parameters, recipe.rate, recipe.steps, decay=0.05):
        if step % 2:
            shown = scenes(source.choice(split("train"), recipe.batch), source)
            shifts = torch.from_numpy(source.integers(-3, 4, (len(shown), 2)))
            inputs = talk.training([CAPTION] * len(shown), [caption(scene) for scene in shown], draw(shown, shifts))
        else:
            asked, answers = zip(*(in_words(source) for _ in range(recipe.batch)))
            inputs = talk.training(asked, answers)
        model(**inputs).loss.backward()
    model.eval()


def caption(scene: Scene) -> str:
    return f"{scene.ink} {NAMES[scene.digit]} {scene.row} {scene.side}"


def in_words(source: np.random.Generator) -> tuple[str, str]:
    """A question without a picture, with its answer: about a caption, arithmetic of two digits, or to repeat a word."""
    one, other = source.integers(0, 10, 2).tolist()
    a, b = NAMES[one], NAMES[other]
    if (kind := source.integers(8)) == 0:
        code = str(source.choice(CODES))
        return f"say {code}", code
    if kind < 4:
        ink, side, row = (str(source.choice(kinds)) for kinds in (list(INKS), SIDES, ROWS))
        asked = [("digit", a), ("ink", ink), ("side", side), ("row", row)][source.integers(4)]
        return f"{ink} {a} {row} {side} . which {asked[0]} ?", asked[1]
    return [
        (f"{a} plus {b} ?", name_of(one + other)),
        (f"{a} minus {b} ?", name_of(one - other)),
        (f"is {a} greater than {b} ?", "yes" if one > other else "no"),
        (f"the larger of {a} and {b} ?", NAMES[max(one, other)]),
        (f"{a} odd or even ?", "odd" if one % 2 else "even"),
        (f"{a} times {b} ?", name_of(one * other)),
    ][source.integers(6)]


def optimise(parameters: list[nn.Parameter], rate: float, steps: int, decay: float) -> Iterator[int]:
    """Yield steps of AdamW with a learning rate that falls along a cosine. The caller computes each step's
    gradients."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        yield step
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def caption_accuracy(model: LlavaForConditionalGeneration, talk: Talk) -> dict[str, float]:
    """The accuracy of the model's captions, by word, in percent, on the split for choosing learning rates."""
    shown = scenes(split("choose"), np.random.default_rng(0))
    said = [text.split() for text in talk.answers(model, [CAPTION] * len(shown), draw(shown))]
    wanted = [caption(scene).split() for scene in shown]
    return {
        name: 100 * float(np.mean([text[place : place + 1] == [words[place]] for text, words in zip(said, wanted)]))
        for place, name in enumerate(("ink", "digit", "row", "side"))
    }
