"""The functions that lmms-eval needs of a task, for the released evaluation files."""

import os

from mixlora_llava.data.images import find_image, load_image
from mixlora_llava.scoring.exact import exact


def doc_to_visual(doc: dict) -> list:
    """The question's image, from the folder that MIXLORA_EVAL_IMAGES names.

    Raises:
        KeyError: the variable is not set.
    """
    return [load_image(find_image(os.environ["MIXLORA_EVAL_IMAGES"], doc["image_path"]))]


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return doc["prompt"]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 if the exact judge says that the answer is the target, else 0."""
    return {"accuracy": float(exact([{"predict": results[0], "target": doc["target"]}])[0])}
