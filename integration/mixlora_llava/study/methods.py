"""The methods that are compared. Each has a PEFT configuration, a scaling, and a first learning rate for its search.

LoRA is PEFT's with alpha = 2 r, which is scaling 2. MixLoRA has alpha = 2 E, which is scaling 8 at E = 16, r = 4. This
is the convention of the paper's Appendix B. Both are also run with the other's scaling. No method has dropout.
"""

from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig

LORA_RATE, MIXLORA_RATE = 2e-3, 1e-3  # where the search begins


class Method(NamedTuple):
    """A method of tuning.

    Attributes:
        label: the method's name in the report.
        kind: "lora", "mixlora" or "untuned".
        settings: fields of the configuration.
        rate: the first learning rate of the search.
        specialists: whether each instruction has its own adapter, trained for an equal part of the steps (Table 3).
        fixed: whether each instruction's factors are drawn beforehand and given to the layers. No router is then
            needed.
        longer: the number of steps, as a multiple of the other methods' number.
    """

    label: str
    kind: str
    settings: dict
    rate: float = LORA_RATE
    specialists: bool = False
    fixed: bool = False
    longer: int = 1

    @property
    def scaling(self) -> float | None:
        """``alpha / r``."""
        if self.kind == "untuned":
            return None
        config = self.config(task_dim=1)
        return config.lora_alpha / config.r if self.kind == "lora" else config.scaling

    @property
    def by_task(self) -> bool:
        """Whether the layers get the instruction as a task embedding."""
        return self.settings.get("routing") == "task"

    def config(self, task_dim: int) -> PeftConfig | None:
        """The PEFT configuration; None for the untuned model.

        Args:
            task_dim: the width of a task's embedding, if the method routes by task.
        """
        if self.kind == "untuned":
            return None
        if self.kind == "lora":
            return LoraConfig(**{"lora_alpha": 2 * self.settings["r"], "task_type": "CAUSAL_LM"} | self.settings)
        width = {"task_dim": task_dim} if self.by_task else {}
        return ConditionalMixLoRAConfig(task_type="CAUSAL_LM", **width, **self.settings)


def lora(r: int, **more) -> Method:
    return Method(f"LoRA r {r}", "lora", {"r": r}, LORA_RATE, **more)


def lora_at_8(r: int) -> Method:
    """LoRA with MixLoRA's scaling."""
    return Method(f"LoRA r {r} at scaling 8", "lora", {"r": r, "lora_alpha": 8 * r}, MIXLORA_RATE)


def mixlora(label: str, r: int = 4, num_factors: int = 16, **settings) -> Method:
    rate = settings.pop("rate", MIXLORA_RATE)
    more = {name: settings.pop(name) for name in ("fixed", "longer") if name in settings}
    settings = {"pool": "sequence", **settings}  # the paper's
    return Method(label, "mixlora", {"r": r, "num_factors": num_factors, **settings}, rate, **more)


TIED = {"conditioning": "tied"}
NORMALIZED = {"gate": "normalized"}
BALANCED = {"pool": "prompt", "balance": 0.3}
RECOMMENDED = {
    name: getattr(ConditionalMixLoRAConfig.tied(), name) for name in ("conditioning", "gate", "pool", "balance")
}
PUBLISHED = {"gate": "binary", "conditioning": "published", "pool": "all", "decode": "token"}

METHODS = {
    "untuned": Method("untuned", "untuned", {}),
    "lora_r2": lora(2),
    "lora_r4": lora(4),
    "lora_r8": lora(8),
    "lora_r16": lora(16),
    "lora_r32": lora(32),
    "lora_r24": lora(24)._replace(label="LoRA r 24, as many parameters as tied"),
    "lora_r62": lora(62)._replace(label="LoRA r 62, as many parameters as the paper's"),
    "specialists_r4": lora(4, specialists=True)._replace(label="LoRA r 4, one for each instruction"),
    "paper": mixlora("MixLoRA as in the paper"),
    "normalized": mixlora("the paper's with a normalized gate", **NORMALIZED),
    "tied": mixlora("tied pairs", **TIED),
    "tied_normalized": mixlora("tied pairs, normalized gate", **TIED, **NORMALIZED),
    "tied_normalized_prompt": mixlora("the same, pooled over the prompt", **TIED, **NORMALIZED, pool="prompt"),
    "tied_text": mixlora("tied, normalized, pooled over the prompt's text", **TIED, **NORMALIZED, pool="text"),
    "tied_balanced": mixlora("tied, normalized, over the prompt, balanced", **TIED, **NORMALIZED, **BALANCED),
    "tied_text_balanced": mixlora("preset tied(): text, balanced", **RECOMMENDED),
    "paper_prompt": mixlora("the paper's, pooled over the prompt", pool="prompt"),
    "unconditional": mixlora("without conditioning (Figure 4)", conditioning="none"),
    "random": mixlora("random routing (Table 2)", routing="random"),
    "task": mixlora("task-specific routing (Table 2)", routing="task"),
    "released": mixlora("as released: fixed routers", **PUBLISHED),
    "fixed": mixlora(
        "factors fixed by the task's number", fixed=True, conditioning="tied", gate="binary", routing="task"
    ),
    "paper_e16_r2": mixlora("MixLoRA E 16, r 2", r=2),
    "paper_e32_r2": mixlora("MixLoRA E 32, r 2", r=2, num_factors=32, rate=MIXLORA_RATE / 2),
    "paper_e32_r4": mixlora("MixLoRA E 32, r 4", num_factors=32, rate=MIXLORA_RATE / 2),
    "paper_e16_r8": mixlora("MixLoRA E 16, r 8", r=8),
    "paper_e32_r8": mixlora("MixLoRA E 32, r 8", r=8, num_factors=32),
    "lora_r4_scaling8": lora_at_8(4),
    "lora_r16_scaling8": lora_at_8(16),
    "lora_r24_scaling8": lora_at_8(24),
    "paper_scaling2": mixlora("MixLoRA as in the paper at scaling 2", alpha=8.0, rate=LORA_RATE),
    "lora_r4_longer": lora(4, longer=3)._replace(label="LoRA r 4, three times the steps"),
    "lora_r16_longer": lora(16, longer=3)._replace(label="LoRA r 16, three times the steps"),
    "paper_longer": mixlora("MixLoRA as in the paper, three times the steps", longer=3),
    "tied_normalized_longer": mixlora("tied, normalized, three times the steps", longer=3, **TIED, **NORMALIZED),
    "lora_r24_scaling8_longer": lora_at_8(24)._replace(label="LoRA r 24 at scaling 8, three times the steps", longer=3),
    "tied_text_balanced_longer": mixlora("preset tied(), three times the steps", longer=3, **RECOMMENDED),
}


def fix_factors(model: nn.Module, tasks: int, seed: int) -> None:
    """Draw each instruction's factors in each layer, so that all factors are used equally often.

    The layers route by the one-hot number of the instruction. The router's rows map it to the drawn factors, and a
    binary gate keeps the router fixed.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, router in model.named_parameters():
        if not name.endswith(".router_A"):
            continue
        E, r = router.shape[0], next(iter(model.peft_config.values())).r
        rounds = -(-tasks * r // E)
        order = torch.cat([torch.randperm(E, generator=generator) for _ in range(rounds)])
        with torch.no_grad():
            router.zero_()
            for task in range(tasks):
                router[order[task * r : (task + 1) * r], task] = torch.linspace(10.0, 9.0, r)


def task_table(method: Method, base: nn.Module, talk, texts: list[str]) -> Tensor | None:
    """The task embedding of each instruction, [T, d]: its one-hot number, or the mean of the untuned decoder's hidden
    states for its text (Equation 10); None if the method has no task embeddings."""
    if not method.by_task:
        return None
    if method.fixed:
        return torch.eye(len(texts))
    decoder = base.model.language_model
    with torch.inference_mode():
        return torch.stack(
            [decoder(torch.tensor([talk.prompt(text, False)])).last_hidden_state[0].mean(0) for text in texts]
        )
