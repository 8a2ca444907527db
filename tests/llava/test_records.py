"""Hostile records: each costs only itself, and is counted and reported under its id."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mixlora_llava.data.conversation import TEMPLATES
from mixlora_llava.data.dataset import NAMED, Conversations, Encoder
from mixlora_llava.data.images import FORMATS, BadImage, check_image, load_image
from mixlora_llava.data.records import read_entries
from mixlora_llava.data.text import shown
from mixlora_llava.model.small import small_llava

TEXTS = [TEMPLATES["v1"].system, "USER: Which digit is it? ASSISTANT: seven three red", "Is it odd? yes no"]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def encoder():
    return Encoder(small_llava(TEXTS, image=8, patch=4, width=24)[1], "bare")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "folder.png").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    picture.save(folder / "a.png")
    picture.save(tmp_path / "secret.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "dangling.png").symlink_to(folder / "none.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:4000])
    Image.new("1", (70_000, 1)).save(folder / "thread.png")
    (folder / "bomb.ppm").write_bytes(b"P6 100000 100000 255\n")
    (folder / "none.gif").write_bytes(b"GIF89a" + bytes(7) + b"\x2c" + bytes(9) + b"\x02\x00\x3b")
    (folder / "text.png").write_text("no image")
    return folder


def talk(question="<image>\nWhich digit is it?", answer="seven", speaker="human"):
    return [{"from": speaker, "value": question}, {"from": "gpt", "value": answer}]


def record(name, **changes):
    return {"id": name, "image": "a.png", "task_name": "name", "conversations": talk()} | changes


# What is wrong, the record as JSON, and the reason that is reported; ``None`` where it is used all the same.
HOSTILE = {
    "image's name of 5,000 characters": (record("r", image="a" * 5000), "no such image"),
    "a path of 5,000 folders": (record("r", image="a/" * 5000), "no such image"),
    "task's name of 5,000 characters": (record("r", task_name="a" * 5000), "task_name of more than 1000 characters"),
    "half a surrogate pair in the question": (
        record("r", conversations=talk("<image> \ud83d")),
        "a message that is not Unicode",
    ),
    "half a surrogate pair in the answer": (
        record("r", conversations=talk(answer="\udcff")),
        "a message that is not Unicode",
    ),
    "half a surrogate pair in the image's name": (
        record("r", image="\ud800.png"),
        "an image's name must be text in Unicode",
    ),
    "half a surrogate pair in the task's name": (record("r", task_name="\ud800"), "task_name is not a text"),
    "a zero byte in the image's name": (record("r", image="a\0.png"), "an image's name must be text in Unicode"),
    "a list as task's name": (record("r", task_name=["name"]), "task_name is not a text"),
    "a number as task's name": (record("r", task_name=3), "task_name is not a text"),
    "a list as image": (record("r", image=["a.png", "a.png"]), "image is not the name of a file"),
    "NaN as image": (record("r", image=float("nan")), "image is not the name of a file"),
    "an object as conversations": (record("r", conversations={"from": "human"}), "no conversation"),
    "a list as message": (record("r", conversations=[["human", "a"]]), "a message without a text"),
    "a list as text": (record("r", conversations=talk(["a"])), "a message without a text"),
    "NaN as text": (record("r", conversations=talk(answer=float("nan"))), "a message without a text"),
    "a list as speaker": (record("r", conversations=talk(speaker=["human"])), "a message without a speaker"),
    "a speaker of 5,000 characters": (
        record("r", conversations=talk(speaker="s" * 5000)),
        f"unknown speaker '{'s' * 40}…(5000 characters)…{'s' * 20}'",
    ),
    "a conversation of two million characters": (
        record("r", conversations=talk("<image>" + "a" * 2_000_000)),
        "more than 1000000 characters",
    ),
    "an image's mark inside an image's mark": (
        record("r", conversations=talk("<im<image>age> a")),
        "<image> in an answer or more than once",
    ),
    "a link out of the folder": (record("r", image="out.png"), "a symbolic link leads out of the image folder"),
    "a folder's link out of the folder": (
        record("r", image="elsewhere/secret.png"),
        "a symbolic link leads out of the image folder",
    ),
    "a link inside of the folder": (record("r", image="inside.png"), None),
    "a link to nothing": (record("r", image="dangling.png"), "no such image"),
    "a link to itself": (record("r", image="loop.png"), "no such image"),
    "a pipe": (record("r", image="pipe.png"), "no such image"),
    "a folder": (record("r", image="folder.png"), "no such image"),
    "no name": (record("r", image=""), "no such image"),
    "ten thousand million pixels": (record("r", image="bomb.ppm"), "more than 89000000 pixels"),
    "one pixel by 70,000": (record("r", image="thread.png"), "more than 200 times as long as wide"),
    "no pixels": (record("r", image="none.gif"), "not an image that can be read"),
    "text as image": (record("r", image="text.png"), "not an image that can be read"),
    "no record": (["r"], "not a record"),
    "null": (None, "not a record"),
    "a list as id": (record(["r"]), "id is neither a text nor an integer"),
    "NaN as id": (record(float("nan")), "id is neither a text nor an integer"),
    "an integer as id": (record(7), None),
    "an id of 5,000 characters": (record("r" * 5000), None),
    "half a surrogate pair as id": (record("\ud800"), None),
    "no id": ({"image": "a.png", "conversations": talk()}, None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_record_costs_only_itself(what, images, encoder):
    entry, reason = HOSTILE[what]
    file = images / "data.json"
    file.write_text(json.dumps([record("before"), entry, record("after")]))
    data = Conversations.read(file, images, encoder)
    names = [found.id for found in data.records]
    given = entry.get("id") if isinstance(entry, dict) else None
    if reason is None:
        assert names[0::2] == ["before", "after"] and data.problems == {}
        assert names[1] == {"an integer as id": "7", "no id": "#1"}.get(what, shown(str(given)))
        assert len(names[1]) < 100 and names[1].encode()
        assert data[1]["labels"].ne(-100).any()
    else:
        name = given if isinstance(given, str) else "#1"
        assert names == ["before", "after"] and data.problems == {reason: [name]}
        with pytest.raises(ValueError, match="1 of 3 records cannot be used"):
            Conversations.read(file, images, encoder, strict=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested too deeply"),
        ('{"id": "r", "image": ' + DEEP + "}", "nested too deeply"),
        ('{"id": "a ] , } \\" [", "more": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
        ("[" * 300 + "]" * 300, "not a record"),
        ('{"id": "r", "image": ' + "[" * 300 + "]" * 300 + "}", "image is not the name of a file"),
        ('{"id": ' + "9" * 5000 + "}", "an integer of too many digits"),
    ],
)
def test_nesting_and_digits_that_the_decoder_refuses(text, reason, images, encoder):
    file = images / "data.json"
    file.write_text(f"[{json.dumps(record('before'))},\n{text} , {json.dumps(record('after'))}]\n")
    data = Conversations.read(file, images, encoder)
    assert [found.id for found in data.records] == ["before", "after"]
    assert list(data.problems) == [reason] and len(data.problems[reason]) == 1


def test_bytes_that_are_not_utf8_cost_the_record_that_holds_them(images, encoder):
    file = images / "data.json"
    bad = json.dumps(record("bad", conversations=talk(answer="caf@"))).encode().replace(b"@", b"\xe9")
    file.write_bytes(b"\xef\xbb\xbf[" + json.dumps(record("good")).encode() + b"," + bad + b"]")
    data = Conversations.read(file, images, encoder)
    assert [found.id for found in data.records] == ["good"]
    assert data.problems == {"a message that is not Unicode": ["bad"]}


@pytest.mark.parametrize(
    "value", [[], [1], [[], {}, "a,]", [1, [2]]], [{"a": [1, 2, {"b": None}]}, 1.5, True], ["\u2028\\\"", "é"]]
)  # fmt: skip
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_as_json_reads_it(tmp_path, value, indent):
    (tmp_path / "f.json").write_text(f" {json.dumps(value, indent=indent)}\n")
    assert read_entries(tmp_path / "f.json") == value
    assert read_entries(tmp_path / "f.json", limit=1) == value[:1]


@pytest.mark.parametrize(
    "text", ["", "{}", "null", "[1", "[1,", "[1,]", "[,]", "[1 2]", "[1]]", "[1] x", "[", "[}", "[" * 10**5]
)
def test_what_is_no_list_in_json_is_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json (is not JSON|must hold a list of records)"):
        read_entries(tmp_path / "f.json")


def test_many_ids_are_counted_and_a_few_named(images, encoder, caplog):
    records = [record(f"bad{number}\n\x1b[31m", image="none.png") for number in range(50)]
    (images / "data.json").write_text(json.dumps([record("good"), record("good"), *records]))
    data = Conversations.read(images / "data.json", images, encoder)
    assert len(data) == 2 and len(data.problems["no such image"]) == 50
    assert "no such image: 50 (bad0\\n\\x1b[31m, " in caplog.text and f"and {50 - NAMED} more" in caplog.text
    assert "bad19\\n" in caplog.text and "bad20" not in caplog.text and "\x1b" not in caplog.text
    assert "1 ids name several records, all of which are used: good" in caplog.text


def test_an_image_that_goes_bad_later_is_replaced_by_the_next_record(images, encoder, caplog):
    records = [record("one", image="cut.png"), record("two"), record("three", image="cut.png")]
    (images / "data.json").write_text(json.dumps(records))
    data = Conversations.read(images / "data.json", images, encoder, decode=False)
    for index in (0, 1, 2, 0):  # the third one's next is the first, which is bad as well
        assert all(torch.equal(value, data[1][key]) for key, value in data[index].items() if key != "task")
    assert data.problems == {"truncated or corrupt": ["one", "three"]}
    assert caplog.text.count("record one is left out") == 1
    strict = Conversations.read(images / "data.json", images, encoder, decode=False, strict=True)
    with pytest.raises(ValueError, match=r"record one: .*cut\.png: truncated"):
        strict[0]
    (images / "a.png").unlink()
    with pytest.raises(ValueError, match="is the image folder still there"):
        data[1]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_damaged_images_are_refused_and_nothing_else_is_raised(tmp_path, kind):
    """Bytes changed, cut out and put in, at random places of a small file of each kind."""
    rng = np.random.default_rng(0)
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(whole, format=kind)
    file, refused = tmp_path / "damaged", 0
    for _ in range(300):
        damaged = bytearray(whole.getvalue())
        for _ in range(int(rng.integers(1, 5))):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        place = rng.integers(len(damaged))
        damaged[place : place + rng.integers(3)] = rng.bytes(rng.integers(3))
        file.write_bytes(damaged)
        for read in (load_image, check_image):
            try:
                found = read(file)
                assert min(found if read is check_image else found.size) > 0
            except BadImage:
                refused += 1
    assert refused > 0


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (2, 7), (4, 4), (1, 200), (200, 1)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_smallest_images_reach_the_model(tmp_path, encoder, size, kind, mode):
    Image.new(mode, size).save(tmp_path / f"a.{kind}")
    (tmp_path / "data.json").write_text(json.dumps([record("r", image=f"a.{kind}")]))
    data = Conversations.read(tmp_path / "data.json", tmp_path, encoder)
    assert data[0]["pixel_values"].shape == (1, 3, 8, 8) and len(data[0]["input_ids"]) == data.lengths[0]
