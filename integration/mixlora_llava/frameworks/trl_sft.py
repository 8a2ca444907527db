"""TRL's supervised fine-tuning from the command line, with MixLoRA.

    accelerate launch -m mixlora_llava.frameworks.trl_sft --config sft.yaml --mixlora_r 4 --mixlora_num_factors 16

It takes the arguments of ``trl sft``, except those of LoRA, and of ``MixLoRAArguments``, on the command line or from
the YAML file. ``trl sft`` itself supports only LoRA: it makes a ``LoraConfig`` from its own arguments.
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from mixlora_kernels.peft import ConditionalMixLoRAConfig

PRESETS = {"paper": ConditionalMixLoRAConfig, "tied": ConditionalMixLoRAConfig.tied}


@dataclass
class MixLoRAArguments:
    """The adapter; see ``ConditionalMixLoRAConfig``."""

    mixlora_preset: Literal["paper", "tied"] = field(
        default="paper", metadata={"help": "The paper's method, or the one that is recommended, with tied pairs."}
    )
    mixlora_r: int = field(default=4, metadata={"help": "Factors chosen for each instance."})
    mixlora_num_factors: int = field(default=16, metadata={"help": "Factors in the pool of each layer."})
    mixlora_alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r; twice the number of factors by default."}
    )
    mixlora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the input of the first factors."})
    mixlora_pool: Literal["prompt", "text", "sequence"] | None = field(
        default=None, metadata={"help": "The tokens that routing averages; by default as in the preset."}
    )
    mixlora_balance: float | None = field(
        default=None, metadata={"help": "Weight of the load-balancing loss; by default as in the preset."}
    )
    mixlora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers to adapt, by name; by default the text decoder's linear layers."},
    )
    mixlora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full, such as a projector."}
    )

    def config(self) -> ConditionalMixLoRAConfig:
        """The configuration that the arguments describe."""
        given = {name.removeprefix("mixlora_"): value for name, value in vars(self).items() if value is not None}
        return PRESETS[given.pop("preset")](task_type="CAUSAL_LM", **given)


def main(arguments: list[str] | None = None) -> None:
    """Train and save an adapter.

    Raises:
        ValueError: ``--use_peft`` is given, an argument in the YAML file is unknown, or the adapter's arguments are
            wrong.
    """
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, MixLoRAArguments))
    script, training, model, mixlora = parser.parse_args_and_config(arguments)
    if model.use_peft:
        raise ValueError("use_peft asks for LoRA: leave it out, this trains a MixLoRA adapter")
    given = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    if (quantization := get_quantization_config(model)) is not None:
        given["quantization_config"] = quantization
    training.model_init_kwargs = given | (training.model_init_kwargs or {})
    data = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=mixlora.config(),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
