"""Labels, templates, batches and bad records, by value."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlavaNextImageProcessor, LlavaNextProcessor, PreTrainedTokenizerFast

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.data.conversation import TEMPLATES, BadRecord, Turn, prompt, read_turns, render
from mixlora_llava.data.dataset import IGNORED, Collator, Conversations, Encoder
from mixlora_llava.data.images import BadImage, check_image, find_image, load_image
from mixlora_llava.model.patch import patch_llava
from mixlora_llava.model.small import SPECIAL, small_llava

TEXTS = [TEMPLATES["v1"].system, "USER: Which digit is it? ASSISTANT: seven three red", "Is it odd? yes no"]
TURNS = [Turn("<image>\nWhich digit is it?", "seven red"), Turn("Is it odd?", "yes")]


@pytest.fixture(scope="module")
def processor():
    return small_llava(TEXTS, image=8, patch=4, width=24)[1]


def llama_like(texts):
    """Byte pairs and a mark for the space before a word, as Llama's tokenizer has."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=300))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_v1_text_and_where_its_answers_are():
    text, spans = render(TURNS, TEMPLATES["v1"], "</s>")
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: <image>\nWhich digit is it? ASSISTANT: seven red</s>"
        "USER: Is it odd? ASSISTANT: yes</s>"
    )
    assert [text[start:end] for start, end in spans] == ["seven red</s>", "yes</s>"]


def test_what_is_generated_from_is_what_was_trained_on():
    text, spans = render(TURNS[:1], TEMPLATES["v1"], "</s>")
    assert prompt("Which digit is it?", TEMPLATES["v1"]) + " " == text[: spans[0][0]]


@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_labels_are_the_answers_and_their_ends(processor, kind):
    encoder = Encoder(processor)
    if kind == "pairs":
        encoder.tokenizer = llama_like(TEXTS)
    ids, labels = encoder.text(TURNS)
    kept = [label for label in labels if label != IGNORED]
    assert kept == [i for i, label in zip(ids, labels) if label != IGNORED]
    assert kept.count(encoder.tokenizer.eos_token_id) == 2
    said = encoder.tokenizer.decode(kept).replace(" ", "").replace("▁", "")
    assert said == "sevenred</s>yes</s>"
    assert ids[0] == encoder.tokenizer.bos_token_id and labels[0] == IGNORED


def test_an_answer_equal_to_words_of_the_question_is_labelled_where_it_is_said(processor):
    ids, labels = Encoder(processor, "bare").text([Turn("red red", "red")])
    assert [label != IGNORED for label in labels] == [False] * (len(ids) - 2) + [True, True]


def test_truncation_leaves_no_answer(processor):
    encoder = Encoder(processor, max_length=30)
    with pytest.raises(BadRecord, match="no answer left after 30 tokens"):
        encoder.text(TURNS)


@pytest.mark.parametrize(
    ("messages", "image", "reason"),
    [
        ([("human", "a"), ("gpt", "b"), ("robot", "c")], False, "unknown speaker 'robot'"),
        ([("human", "a")], False, "no answer"),
        ([("gpt", "b")], False, "no answer"),
        ([("human", "a"), ("human", "b")], False, "do not take turns"),
        ([("human", "a"), ("gpt", " ")], False, "empty answer"),
        ([("human", "<image> a"), ("gpt", "b")], False, "without an image"),
        ([("human", "<image> a <image>"), ("gpt", "b")], True, "more than once"),
        ([("human", "a"), ("gpt", "<image>")], True, "in an answer"),
        ([], False, "no conversation"),
    ],
)
def test_bad_conversations(messages, image, reason):
    with pytest.raises(BadRecord, match=reason):
        read_turns([{"from": speaker, "value": text} for speaker, text in messages], image)


def test_image_comes_before_the_question_that_mentions_it():
    messages = [("gpt", "hello"), ("human", "a"), ("gpt", "b"), ("human", "c <image>"), ("gpt", "d")]
    turns = read_turns([{"from": speaker, "value": text} for speaker, text in messages], True)
    assert turns == [("a", "b"), ("<image>\nc", "d")]
    assert read_turns([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], True)[0] == ("<image>\na", "b")


def write(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def record(name, image="a.png", answer="seven", speaker="human", question="<image>\nWhich digit is it?"):
    talk = [{"from": speaker, "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "task_name": "name", "conversations": talk}


@pytest.fixture
def images(tmp_path):
    size = (12000, 12000)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (5, 5)).save(tmp_path / "palette.png")
    header = struct.pack(">4sIIBBBBB", b"IHDR", *size, 8, 2, 0, 0, 0)  # says 12000 x 12000, and no more
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT" + bytes(4))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    return tmp_path


@pytest.mark.parametrize("name", ["a.png", "whole.jpg", "cmyk.jpg", "moving.gif", "deep.png", "palette.png"])
def test_images_become_rgb(images, name):
    image = load_image(images / name)
    assert image.mode == "RGB" and image.size == check_image(images / name)
    expected = {"moving.gif": (254, 0, 0), "deep.png": (156, 156, 156), "palette.png": (0, 0, 0)}.get(name)
    if expected:  # the first frame; 40000 // 256; a GIF's palette may round by one
        assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cut.jpg", "truncated"), ("cut.png", "truncated"), ("text.png", "not an image"), ("empty.png", "not an image"),
        ("huge.png", r"more than 89000000 pixels \(12000 x 12000\)"), ("float.tiff", "floating point"),
        ("none.png", "no such image"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [load_image, check_image])
def test_images_refused_by_name(images, name, why, read):
    with pytest.raises(BadImage, match=why) as error:
        read(images / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "x/../../a.png", "C:\\a.png"])
def test_images_stay_in_their_folder(images, name):
    with pytest.raises(BadImage, match="must stay inside"):
        find_image(images, name)


def test_bad_records_are_reported_by_id_and_refused_when_strict(images, processor, caplog):
    file = write(
        images,
        [record("good"), record("gone", "none.png"), record("cut", "cut.jpg"), record("who", speaker="system"), 5],
    )
    data = Conversations.read(file, images, Encoder(processor))
    assert [r.id for r in data.records] == ["good"]
    assert {name for ids in data.problems.values() for name in ids} == {"gone", "cut", "who", "#4"}
    assert data.problems["no such image"] == ["gone"] and data.problems["unknown speaker 'system'"] == ["who"]
    assert "4 of 5 records cannot be used" in caplog.text and "gone" in caplog.text
    with pytest.raises(ValueError, match="4 of 5 records"):
        Conversations.read(file, images, Encoder(processor), strict=True)


def test_items_and_batches(images, processor):
    records = [record("one"), record("two", None, question="Is it odd?", answer="yes"), record("three", "cmyk.jpg")]
    encoder = Encoder(processor, "bare")
    data = Conversations.read(write(images, records), images, encoder)
    items = [data[i] for i in range(3)]
    assert [len(item["input_ids"]) for item in items] == data.lengths
    assert (items[0]["input_ids"] == encoder.image_id).sum() == 4  # 8 pixels in patches of 4
    batch = Collator(0, torch.tensor([[5.0, 6.0]]))(items)
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["task_embedding"].tolist() == [[5.0, 6.0]] * 3
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert (batch["labels"][row, length:] == IGNORED).all() and not batch["attention_mask"][row, length:].any()
        assert batch["attention_mask"][row, :length].all()


@pytest.mark.parametrize("pool", ["sequence", "prompt"])
def test_a_blank_image_in_the_padding_changes_nothing(images, processor, pool):
    """A batch of texts alone, with and without it: the same loss and gradients, but for the projector's, now zero."""
    model = patch_llava(
        small_llava(TEXTS, image=8, patch=4, width=24)[0].eval(),
        ConditionalMixLoRAConfig(r=2, num_factors=4, init_weights=False, pool=pool, task_type="CAUSAL_LM"),
        train_projector=True,
    ).model
    records = [
        record(name, None, question="Is it " + word, answer="yes") for name, word in (("a", "odd?"), ("b", "red"))
    ]
    encoder = Encoder(processor, "bare")
    data = Conversations.read(write(images, records), images, encoder)
    found = []
    for blank in (None, encoder.blank()):
        batch = Collator(0, blank=blank)([data[0], data[1]])
        loss = model(**batch).loss
        loss.backward()
        found.append(
            {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()}
        )
        model.zero_grad(set_to_none=True)
    assert batch["input_ids"].shape[1] > batch["attention_mask"].sum(1).max()
    for name, without in found[0].items():
        if "projector" in name:
            assert without is None and found[1][name] is not None and not found[1][name].any()
        else:  # float32: longer rows are summed in another order, which moves gradients of 0.1 by 1.5e-8
            assert torch.allclose(without, found[1][name], rtol=1e-6, atol=1e-7), name


def test_llava_next_counts_tokens_by_image_size(images, processor):
    images_of_next = LlavaNextImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=[[8, 32], [16, 16]],
    )
    of_next = LlavaNextProcessor(
        image_processor=images_of_next, tokenizer=processor.tokenizer, patch_size=4,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    Image.new("RGB", (64, 9)).save(images / "wide.png")
    data = Conversations.read(write(images, [record("a"), record("b", "wide.png")]), images, Encoder(of_next, "bare"))
    items = [data[0], data[1]]
    assert [len(item["input_ids"]) for item in items] == data.lengths and data.lengths[0] != data.lengths[1]
    batch = Collator(0)(items)
    most = max(item["pixel_values"].shape[1] for item in items)
    assert batch["pixel_values"].shape[:2] == (2, most) and batch["image_sizes"].tolist() == [[40, 60], [9, 64]]


def test_refuses_a_slow_tokenizer(processor):
    class Slow:
        tokenizer = type("SlowTokenizer", (), {"is_fast": False})()

    with pytest.raises(ValueError, match="SlowTokenizer"):
        Encoder(Slow())
