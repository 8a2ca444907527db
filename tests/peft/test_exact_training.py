"""Training: an instance's logits and gradients are those of that instance alone, whatever shares its batch."""

from itertools import pairwise

import pytest
import torch

from . import models
from .models import FAMILIES, IMAGE_TOKEN, build, gradients, pad, prompts, relative

# In float64, sums in another order; a wrong routing is off by far more (see test_a_wrong_mask_would_show).
TOLERANCE = 1e-11
# In float32: rounding errors of 2**-24 = 6e-8 that add up over two layers, in the order that a CPU's own product takes;
# 0.9e-6 and 1.07e-6 were seen on two CPUs. A wrong routing is off by far more.
SINGLE = 5e-6


def batch_of(family: str, rows: int = 3, side: str = "right"):
    """Instances, the batch that holds them padded, and the images of each."""
    kind = FAMILIES[family]
    instances = prompts(rows, image_tokens=kind.image_tokens)
    torch.manual_seed(5)
    images = {name: in_double(value) for name, value in kind.images(rows).items()}
    own = [{name: value.chunk(rows)[row] for name, value in images.items()} for row in range(rows)]
    ids, mask = pad(instances, side, value=7)
    batch = {"input_ids": ids, "attention_mask": mask, **images}
    if side == "left" and family != "qwen2_5_vl":  # which counts from the first real token by itself
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return instances, batch, own


def in_double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def adapt(model, **settings):
    return models.adapt(model, **settings).double().train()


def extra(family: str, ids: torch.Tensor) -> dict:
    return {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()} if family == "qwen2_5_vl" else {}


def answer_of(logits: torch.Tensor) -> torch.Tensor:
    """A loss of which every logit of the instance has a part."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits.log_softmax(-1) * weights).sum()


def alone(model, family: str, instances, own) -> tuple[list, dict]:
    """Logits of each instance in a forward of its own, and the sum of the gradients."""
    logits = []
    for tokens, images in zip(instances, own):
        ids = tokens[None]
        one = model(input_ids=ids, use_cache=False, **images, **extra(family, ids)).logits[0]
        answer_of(one).backward()
        logits.append(one.detach())
    return logits, gradients(model)


def check(model, logits, expected_logits, expected_gradients, tolerance=TOLERANCE):
    for found, expected in zip(logits, expected_logits):
        assert relative(found, expected) < tolerance
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    error = sum((found[name] - expected).square().sum() for name, expected in expected_gradients.items())
    size = sum(expected.square().sum() for expected in expected_gradients.values())
    assert error < tolerance**2 * size


def rows_of(logits, batch):
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"])]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family, side):
    model = adapt(build(family))
    instances, batch, own = batch_of(family, side=side)
    expected = alone(model, family, instances, own)
    logits = rows_of(model(**batch, use_cache=False, **extra(family, batch["input_ids"])).logits, batch)
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_single_precision(side):
    model = models.adapt(build("llava"), alpha=4).train()
    instances, batch, own = batch_of("llava", side=side)
    batch, *own = ({n: v.float() if v.is_floating_point() else v for n, v in some.items()} for some in (batch, *own))
    expected = alone(model, "llava", instances, own)
    logits = rows_of(model(**batch, use_cache=False).logits, batch)
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected, tolerance=SINGLE)


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_masks_of_four_dimensions(form):
    """[B, 1, L, L], made by the user: padding is found on the diagonal."""
    model = adapt(build())
    instances, batch, own = batch_of("llama")
    expected = alone(model, "llama", instances, own)
    real = batch["attention_mask"].bool()
    sees = real[:, None, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    mask = sees if form == "bool" else torch.zeros(sees.shape).double().masked_fill(~sees, -1e300)
    logits = rows_of(model(**{**batch, "attention_mask": mask}, use_cache=False).logits, batch)
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_several_images_in_one_instance():
    model = adapt(build("llava"))
    instances = prompts(2, image_tokens=4)
    instances[0] = torch.cat((instances[0], instances[0][1:]))  # a second image, and more text
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    own = [{"pixel_values": pixels[:2]}, {"pixel_values": pixels[2:]}]
    expected = alone(model, "llava", instances, own)
    ids, mask = pad(instances, "right", value=7)
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
    logits = rows_of(logits, {"attention_mask": mask})
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


@pytest.mark.parametrize("settings", [{"gate": "weighted"}, {"gate": "binary", "conditioning": "published"}])
def test_padding_other_gates(settings):
    model = adapt(build(), **settings)
    instances, batch, own = batch_of("llama")
    expected = alone(model, "llama", instances, own)
    logits = rows_of(model(**batch).logits, batch)
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_a_wrong_mask_would_show():
    """The bound of the other tests is no accident: padding in the mean moves the logits by far more."""
    model = adapt(build(), pool="all")
    instances, batch, own = batch_of("llama")
    logits = rows_of(model(**batch).logits, batch)
    expected, _ = alone(model, "llama", instances, own)
    assert relative(logits[1], expected[1]) > 1e-2


def test_accumulation():
    model = adapt(build())
    instances, _, own = batch_of("llama")
    expected = alone(model, "llama", instances, own)
    logits = []
    for some in (instances[:1], instances[1:]):
        ids, mask = pad(some, "right")
        found = rows_of(model(input_ids=ids, attention_mask=mask).logits, {"attention_mask": mask})
        sum(map(answer_of, found)).backward()
        logits += found
    check(model, logits, *expected)


def packed(instances):
    lengths = [len(tokens) for tokens in instances]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "input_ids": torch.cat(instances)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": cu.int(),
        "seq_idx": torch.repeat_interleave(torch.tensor(lengths))[None].int(),
    }, cu.tolist()


@pytest.mark.parametrize(
    "told", [(), ("seq_idx",), ("cu_seq_lens_q",), ("seq_idx", "cu_seq_lens_q")], ids=lambda told: "+".join(told) or "-"
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_packing(told, checkpointing):
    model = adapt(build())
    instances, _, own = batch_of("llama")
    expected = alone(model, "llama", instances, own)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    everything, edges = packed(instances)
    row = {name: everything[name] for name in ("input_ids", "position_ids", *told)}
    logits = model(**row, use_cache=False).logits[0]
    logits = [logits[a:b] for a, b in pairwise(edges)]
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_packing_of_several_rows():
    model = adapt(build())
    instances = prompts(3, lengths=(9, 4, 5))
    expected = alone(model, "llama", instances, [{}] * 3)
    ids = torch.stack((instances[0], torch.cat(instances[1:])))
    positions = torch.stack((torch.arange(9), torch.cat((torch.arange(4), torch.arange(5)))))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits = [logits[0], logits[1, :4], logits[1, 4:]]
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_the_prompts_of_several_packed_rows():
    """pool="prompt" with labels: each instance is routed by its own prompt."""
    model = adapt(build(), pool="prompt")
    instances, ends = prompts(3, lengths=(9, 4, 5)), (4, 2, 3)
    labels = [tokens.clone() for tokens in instances]
    for label, end in zip(labels, ends):
        label[:end] = -100
    alone = [model(input_ids=t[None], labels=label[None]).logits[0] for t, label in zip(instances, labels)]
    ids, label = (torch.stack((rows[0], torch.cat(rows[1:]))) for rows in (instances, labels))
    positions = torch.stack((torch.arange(9), torch.cat((torch.arange(4), torch.arange(5)))))
    logits = model(input_ids=ids, labels=label, position_ids=positions, use_cache=False).logits
    for found, wanted in zip((logits[0], logits[1, :4], logits[1, 4:]), alone):
        assert relative(found, wanted) < TOLERANCE


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_only_the_prompt_routes_where_it_is_told_to(form):
    """pool="prompt": training routes as generation will, so the answer may be anything."""
    model = adapt(build(), pool="prompt")
    instances = prompts(3)
    ends = [4, 3, 5]
    changed = [tokens.clone() for tokens in instances]
    for tokens, end in zip(changed, ends):
        tokens[end:] = 91 - tokens[end:]
    found = []
    for some in (instances, changed):
        labels = [tokens.clone() for tokens in some]
        for label, end in zip(labels, ends):
            label[:end] = label[-1:] = -100  # the end of the answer is no prompt, though no label
        if form == "padded":
            ids, mask = pad(some, "right")
            label = torch.stack([torch.cat((x, x.new_full((9 - len(x),), -100))) for x in labels])
            logits = model(input_ids=ids, attention_mask=mask, labels=label).logits
            found.append([row[:end] for row, end in zip(logits, ends)])
        else:
            everything, edges = packed(some)
            row = {name: everything[name] for name in ("input_ids", "position_ids")}
            logits = model(**row, labels=torch.cat(labels)[None], use_cache=False).logits[0]
            found.append([logits[a : a + end] for a, end in zip(edges, ends)])
    model.eval()  # where no labels mean a prompt
    own = [model(input_ids=tokens[None, :end]).logits[0] for tokens, end in zip(instances, ends)]
    for first, second, third in zip(*found, own):
        # Causal attention: a prompt's logits depend on the answer through routing alone.
        assert relative(first, second) < TOLERANCE
        assert relative(first, third) < TOLERANCE


def test_task_embedding():
    model = adapt(build(), routing="task", task_dim=5)
    instances, batch, _ = batch_of("llama")
    task = torch.randn(3, 5, dtype=torch.float64)
    own = [{"task_embedding": task[row : row + 1]} for row in range(3)]
    expected = alone(model, "llama", instances, own)
    logits = rows_of(model(**batch, task_embedding=task).logits, batch)
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_a_row_of_padding_fills_up_a_batch():
    model = adapt(build())
    instances, batch, own = batch_of("llama")
    expected, _ = alone(model, "llama", instances, own)
    row = torch.zeros_like(batch["input_ids"][:1])
    batch["position_ids"] = torch.arange(row.shape[1]).expand(3, -1)
    filled = {name: torch.cat((value, row)) for name, value in batch.items()}  # its positions are all 0, too
    logits = model(**filled).logits
    assert torch.isfinite(logits).all()
    for found, wanted in zip(rows_of(logits, batch), expected):
        assert relative(found, wanted) < TOLERANCE
