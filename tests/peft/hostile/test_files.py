"""Files of weights that are broken, or something else than they seem."""

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from .adapters import (
    BIN,
    CONFIG,
    QUERY,
    SAFE,
    check_refused,
    weights_of,
    write,
)


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file: Path, header: dict | str, body: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def overlapping(file):
    header, body = header_of(file)
    names = [name for name in header if name.endswith("lora_A")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    with_header(file, header, body)


def beyond_the_end(file):
    header, body = header_of(file)
    header[f"{QUERY}.lora_A"]["data_offsets"] = [0, 10**15]
    with_header(file, header, body)


def wrong_dtype(file):
    header, body = header_of(file)
    header[f"{QUERY}.lora_A"]["dtype"] = "F33"
    with_header(file, header, body)


def overflowing_shape(file):
    header, body = header_of(file)
    header[f"{QUERY}.lora_A"]["shape"] = [2**62, 2**62]
    with_header(file, header, body)


def huge_header(file):
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def no_json(file):
    with_header(file, "{" * 1000, b"")


def a_key_twice(file):
    header, body = header_of(file)
    entry = header[f"{QUERY}.lora_A"] | {"shape": [1, 1]}
    with_header(file, json.dumps(header)[:-1] + f', "{QUERY}.lora_A": {json.dumps(entry)}}}', body)


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_link_to_nowhere(file):
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def a_link_elsewhere(file):
    file.unlink()
    file.symlink_to("/dev/zero")


BROKEN = {
    "overlapping offsets": overlapping,
    "offsets beyond the end": beyond_the_end,
    "an unknown dtype": wrong_dtype,
    "a shape that overflows": overflowing_shape,
    "a header of an exabyte": huge_header,
    "a header that is no JSON": no_json,
    "a key that is there twice": a_key_twice,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "a folder in its place": a_folder,
    "a pipe in its place": a_pipe,
    "a link to nowhere": a_link_to_nowhere,
    "a link to a device": a_link_elsewhere,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(good, tmp_path, case):
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    (tmp_path / SAFE).write_bytes((good / SAFE).read_bytes())
    BROKEN[case](tmp_path / SAFE)
    check_refused(tmp_path, ValueError, "truncated or corrupt|is not a file|has neither")


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def bins(file: Path, case: str) -> None:
    whole = torch.load(file)
    if case == "code":
        torch.save(whole | {"x": Attack()}, file)
    elif case == "a list":
        torch.save(list(whole.values()), file)
    elif case == "numbers for names":
        torch.save(dict(enumerate(whole.values())), file)
    elif case == "a sparse tensor":
        torch.save(whole | {f"{QUERY}.lora_A": whole[f"{QUERY}.lora_A"].to_sparse()}, file)
    elif case == "a string for a tensor":
        torch.save(whole | {f"{QUERY}.lora_A": "lora_A"}, file)
    elif case == "the old format":
        torch.save(whole, file, _use_new_zipfile_serialization=False)
    elif case == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif case == "empty":
        file.write_bytes(b"")
    else:  # an archive of something else
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.pkl", b"nothing")


@pytest.mark.parametrize(
    "case",
    ["code", "a list", "numbers for names", "a sparse tensor", "a string for a tensor", "the old format", "truncated",
     "empty", "a zip file"],
)  # fmt: skip
def test_broken_bin(good, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    write(tmp_path / BIN, weights_of(good))
    bins(tmp_path / BIN, case)
    check_refused(tmp_path, ValueError, "is not what torch.save writes|weights are (dense )?tensors by name")
    assert not (tmp_path / "pwned").exists()


def test_no_weights(good, tmp_path):
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    check_refused(tmp_path, ValueError, f"has neither {SAFE} nor {BIN}")
