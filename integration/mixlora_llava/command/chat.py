"""Ask one question about one image."""

import argparse
from pathlib import Path

from ..refusal import Refusal
from .model_arguments import add_model, chosen_template
from .values import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--adapter", type=Path, help="without it, the untuned model answers")
    parser.add_argument("--task", help="for an adapter that routes by task: the task's name")
    parser.add_argument("--factors", action="store_true", help="show which factors each layer chose")
    parser.add_argument("--max-new-tokens", type=count, default=256)


def run(options: argparse.Namespace) -> None:
    if options.factors and not options.adapter:
        raise Refusal("--factors needs --adapter")
    if options.task and not options.adapter:
        raise Refusal("--task needs --adapter")

    from transformers import TextStreamer

    from ..analysis.prompts import routing_side
    from ..data.images import load_image
    from ..model.generate import answer, build_prompt
    from ..model.load import load_adapter, load_llava, read_source

    image = load_image(options.image)
    model, processor = load_llava(read_source(options.model))
    embedding = None
    if options.adapter:
        model, embeddings = load_adapter(model, options.adapter)
        if embeddings is not None:
            if options.task not in embeddings:
                raise Refusal(f"--task must be one of {', '.join(embeddings)}, got {options.task}")
            embedding = embeddings[options.task]
        elif options.task:
            raise Refusal(
                f"--task is for an adapter with task embeddings, which {options.adapter} has not: leave it out"
            )
    if options.factors:
        side = routing_side(model)  # refuses an adapter of another method before the answer
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = build_prompt(options.prompt, chosen_template(options))
    answer(
        model, processor, [text], [image], max_new_tokens=options.max_new_tokens, embedding=embedding, streamer=streamer
    )
    if options.factors:
        for (layer, _), routing in side.last.items():
            print(f"{layer}: A {routing.index_a[0].tolist()}, B {routing.index_b[0].tolist()}")
