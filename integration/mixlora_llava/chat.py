"""One question about one image.

python -m mixlora_llava.chat --model MODEL --image FILE --prompt TEXT [--adapter DIR] [--factors]
"""

import argparse
from pathlib import Path

from transformers import TextStreamer

from mixlora_kernels.peft.side_information import find_side_information

from .data.conversation import TEMPLATES
from .data.images import BadImage, load_image
from .model.generate import answer, build_prompt
from .model.load import load_adapter, load_llava, read_source


def chosen_factors(model) -> dict[str, dict[str, list[int]]]:
    """The factors that each layer chose for the last answer's only instance, most probable first.

    Raises:
        ValueError: the model has no MixLoRA layers.
    """
    last = find_side_information(model).last
    return {
        key: {"A": routing.index_a[0].tolist(), "B": routing.index_b[0].tolist()} for (key, _), routing in last.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a LLaVA, or its parts as JSON")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--task", help="for an adapter that routes by task: the task's name")
    parser.add_argument("--factors", action="store_true", help="show which factors each layer chose")
    parser.add_argument("--template", choices=list(TEMPLATES), default="v1")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    if options.factors and not options.adapter:
        parser.error("--factors needs --adapter")
    try:
        image = load_image(options.image)
    except BadImage as error:
        parser.error(str(error))
    model, processor = load_llava(read_source(options.model))
    embedding = None
    if options.adapter:
        model, embeddings = load_adapter(model, options.adapter)
        if embeddings is not None:
            if options.task not in embeddings:
                parser.error(f"--task must be one of {', '.join(embeddings)}, got {options.task}")
            embedding = embeddings[options.task]
    if options.factors:
        find_side_information(model)  # refuses other adapters before the answer
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = build_prompt(options.prompt, options.template)
    answer(
        model, processor, [text], [image], max_new_tokens=options.max_new_tokens, embedding=embedding, streamer=streamer
    )
    if options.factors:
        for layer, chosen in chosen_factors(model).items():
            print(f"{layer}: A {chosen['A']}, B {chosen['B']}")


if __name__ == "__main__":
    main()
