"""A LLaVA with a MixLoRA or LoRA adapter, as a model of lmms-eval.

    python -m lmms_eval --model mixlora_llava --model_args pretrained=MODEL,adapter=DIR --tasks mme,pope,textvqa_val \\
        --batch_size 8

For the sets that lmms-eval lacks, add ``--include_path "$(mixlora --path lmms_tasks)" --tasks mixlora_unseen``.
"""

import json

import torch
from accelerate import PartialState
from lmms_eval.api.model import lmms

from ..data.dataset import IGNORED
from ..model.generate import answer, build_prompt
from ..model.load import load_adapter, load_llava, read_source
from ..training.remembered import trained_template


class MixLoRALlava(lmms):
    """See ``lmms_eval.api.model.lmms``.

    Args:
        pretrained: the folder or hub name of a LLaVA, or its parts as JSON.
        adapter: the adapter's folder; None: the untuned model.
        template: the conversation's template; None: that of the adapter's training, or ``"v1"`` where none is recorded.
        batch_size: the number of questions in a batch.
        device: a torch device; by default the device of this process.
        task: the task whose embedding an adapter with task routing uses.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        template: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        task: str | None = None,
    ):
        super().__init__()
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        # lmms-eval gathers the processes' counts on it.
        self.device = state.device if device is None or state.num_processes > 1 else torch.device(device)
        if template is None:
            template = (trained_template(adapter) if adapter else None) or "v1"
        model, self.processor = load_llava(read_source(pretrained), dtype)
        self.embedding = None
        model.to(self.device)
        if adapter is not None:
            model, embeddings = load_adapter(model, adapter)
            if embeddings is not None:
                if task not in embeddings:
                    raise ValueError(f"task must be one of {', '.join(embeddings)}, got {task!r}")
                self.embedding = embeddings[task]
        self.model, self.template, self.batch_size = model, template, int(batch_size)

    def generate_until(self, requests: list) -> list[str]:
        """Generate an answer to each request, and cut it at the first of its stop words."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            # What a batch shares: its generation options, and whether there are images.
            key = json.dumps([request.args[1], bool(self._images(request.args))], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                said = self._answer([requests[number].args for number in batch])
                for number, text in zip(batch, said):
                    answers[number] = text
        return answers

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Compute for each request the log-probability of its continuation, and whether greedy decoding would give
        it."""
        return [self._score(request.args) for request in requests]

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("mixlora_llava answers single questions; tasks of several rounds are not supported")

    def _images(self, args: tuple) -> list:
        _, _, doc_to_visual, doc_id, task, split = args
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if len(images) > 1:
            raise ValueError(f"{task} {doc_id}: a LLaVA of this kind sees one image, got {len(images)}")
        return [image.convert("RGB") for image in images]

    def _answer(self, batch: list[tuple]) -> list[str]:
        images = [image for args in batch for image in self._images(args)] or None
        prompts = [build_prompt(args[0], self.template, image=images is not None) for args in batch]
        options = dict(batch[0][1])
        until = options.pop("until", [])
        known = {
            name: options[name] for name in ("do_sample", "top_p", "num_beams", "max_new_tokens") if name in options
        }
        if options.get("temperature"):
            known |= {"temperature": options["temperature"], "do_sample": known.get("do_sample", True)}
        said = answer(self.model, self.processor, prompts, images, embedding=self.embedding, **known)
        stops = [until] if isinstance(until, str) else until
        return [cut(text, stops) for text in said]

    @torch.inference_mode()
    def _score(self, args: tuple) -> tuple[float, bool]:
        context, continuation, *rest = args
        if callable(continuation):
            _, doc_id, task, split = rest
            continuation = continuation(self.task_dict[task][split][doc_id])
        images = self._images((context, None, *rest)) or None
        prompt = build_prompt(context, self.template, image=images is not None)
        texts = [prompt, f"{prompt} {continuation.lstrip()}"]  # lmms-eval adds the space before a choice
        start = self.processor(text=texts[:1], images=images, return_tensors="pt")["input_ids"].shape[1]
        inputs = self.processor(text=texts[1:], images=images, return_tensors="pt").to(self.device)
        inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        labels = inputs["input_ids"].clone()
        labels[:, :start] = IGNORED
        if images:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(self.model.parameters()).dtype)
        logits = self.model(**inputs, use_cache=False).logits[0, start - 1 : -1].float()
        wanted = labels[0, start:]
        log_probability = logits.log_softmax(-1).gather(1, wanted.unsqueeze(1)).sum()
        return float(log_probability), bool((logits.argmax(-1) == wanted).all())


def cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stop words."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)].strip() if ends else text
