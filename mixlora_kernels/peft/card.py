"""The model card of a saved adapter: what it is, how to load it, the versions that made it, and the citation."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__

NAME = "README.md"
BEGIN, END = "<!-- mixlora_kernels: written at every saving -->", "<!-- mixlora_kernels: end -->"
TEMPLATE = "# Model Card for Model ID"  # the heading of the empty card that peft writes
UNTOLD = ("peft_type", "peft_version", "mixlora_kernels_version", "auto_mapping", "inference_mode", "init_weights")

CITATION = """\
@inproceedings{shen-etal-2024-multimodal,
  title     = {Multimodal Instruction Tuning with Conditional Mixture of {LoRA}},
  author    = {Shen, Ying and Xu, Zhiyang and Wang, Qifan and Cheng, Yu and Yin, Wenpeng and Huang, Lifu},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)},
  pages     = {637--648},
  year      = {2024},
  doi       = {10.18653/v1/2024.acl-long.38},
}"""


def write_card(folder: Path, config: Any) -> None:
    """Write or update the card in an adapter's folder.

    peft's empty card is replaced. In another card, only the text between the two marks is replaced, or appended if
    there are no marks; text written by hand and metadata stay.

    Args:
        folder: where the adapter is saved.
        config: the adapter's ``ConditionalMixLoRAConfig``.
    """
    file = folder / NAME
    card = ModelCard.load(file) if file.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "mixlora", "conditional-mixture-of-lora"})
    if config.base_model_name_or_path and not card.data.get("base_model"):
        card.data["base_model"] = config.base_model_name_or_path
    ours = f"{BEGIN}\n\n{describe(config)}\n\n{END}"
    if BEGIN in card.text and END in card.text:
        before, _, rest = card.text.partition(BEGIN)
        card.text = before + ours + rest.partition(END)[2]
    elif TEMPLATE in card.text or not card.text.strip():
        card.text = ours + "\n"
    else:
        card.text = f"{card.text.rstrip()}\n\n{ours}\n"
    card.save(file)


def describe(config: Any) -> str:
    """The card's text, in Markdown."""
    base = config.base_model_name_or_path
    settings = [
        f"| `{field.name}` | `{_plain(getattr(config, field.name))}` |"
        for field in dataclasses.fields(config)
        if field.name not in UNTOLD and getattr(config, field.name) not in (None, "")
    ]
    versions = [f"- {name} {_version(name)}" for name in ("transformers", "torch")]
    return "\n".join(
        [
            f"# A MixLoRA adapter for {base or 'a model without a name'}",
            "",
            "Conditional Mixture-of-LoRA: each adapted linear layer has a pool of rank-1 factors, and routers choose a "
            "few of them for every input.",
            "",
            "## Load it",
            "",
            "```python",
            "import mixlora_kernels.peft  # makes the method known to peft; without it: KeyError 'CONDITIONAL_MIXLORA'",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(model, FOLDER)  # model: "
            + (f"the base, {base}" if base else "the base; its name was not on record"),
            "```",
            "",
            "## Settings",
            "",
            "| setting | value |",
            "|---|---|",
            *settings,
            "",
            "### Framework versions",
            "",
            f"- mixlora_kernels {__version__}",
            f"- PEFT {_version('peft')}",
            *versions,
            "",
            "## Citation",
            "",
            "```bibtex",
            CITATION,
            "```",
        ]
    )


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _plain(value: Any) -> str:
    """A value as text for a table's cell: sets are sorted, and bars are escaped."""
    value = sorted(value) if isinstance(value, set) else getattr(value, "value", value)
    return str(value).replace("|", "\\|").replace("`", "'").replace("\n", " ")
