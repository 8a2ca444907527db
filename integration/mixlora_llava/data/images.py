"""Read images from files as RGB, in any raster format that PIL reads. Other files are refused, with the reason."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image

from ..refusal import Refusal
from .text import is_text, shown

# Raster formats only: for some other formats PIL runs other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_000_000  # 267 MB as RGB, just below PIL's limit for a warning; photographs are far smaller
# If a processor scales the short side to 336 pixels, the long side then has at most 67,200. Without a limit, a file of
# a few hundred bytes could need terabytes. Qwen2-VL's processor has the same limit.
MAX_RATIO = 200
T = TypeVar("T")


class BadImage(Refusal):
    """An image cannot be used.

    Attributes:
        why: the reason, as a text that is the same for all images with this reason.
    """

    def __init__(self, file: str | Path, why: str, detail: object = None):
        super().__init__(
            f"{shown(str(file), 300)}: {why}" + ("" if detail is None else f" ({shown(str(detail), 300)})")
        )
        self.why = why


def find_image(folder: str | Path, name: str) -> Path:
    """The path of an image in its folder, with symbolic links resolved.

    Raises:
        BadImage: the name is not a valid file name, leads out of the folder, or there is no such file.
    """
    if not is_text(name) or "\0" in name:
        raise BadImage(name, "an image's name must be text in Unicode")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise BadImage(name, "an image's name must stay inside the image folder")
    try:
        home = os.path.realpath(folder, strict=True)
        file = Path(os.path.realpath(Path(home, parts), strict=True))
    except OSError as error:  # for example a name that is too long, a link to itself, or a folder without permission
        raise BadImage(Path(folder, parts), "no such image", error.strerror) from error
    if not file.is_relative_to(home):
        raise BadImage(Path(folder, parts), "a symbolic link leads out of the image folder")
    if not file.is_file():
        raise BadImage(Path(folder, parts), "no such image", "not a file")
    return file


def load_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as RGB. An animation gives its first frame. CMYK, palettes, alpha and 16 bits are converted.

    Raises:
        BadImage: the file is missing, truncated, not an image, or empty; the image has more than ``max_pixels`` pixels,
            is more than ``MAX_RATIO`` times as long as wide, or has floating-point pixels.
    """
    with _open(file, max_pixels) as image:
        return _decode(file, lambda: _to_rgb(image))


def check_image(file: str | Path, decode: bool = True, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Check an image, and return its width and height.

    Args:
        decode: whether to read the pixels too, which finds truncated files. JPEGs are decoded at an eighth of their
            size, which reads the whole file in a fraction of the time.

    Raises:
        BadImage: as ``load_image``.
    """
    with _open(file, max_pixels) as image:
        size = image.size
        if decode:
            _decode(file, lambda: _read_all(image))
        return size


def _open(file: str | Path, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except FileNotFoundError as error:
        raise BadImage(file, "no such image") from error
    except Image.DecompressionBombError as error:
        raise BadImage(file, f"more than {max_pixels} pixels", error) from error
    except Exception as error:  # PIL does not document which errors its decoders raise
        raise BadImage(file, "not an image that can be read", error) from error
    why = _unusable(image, max_pixels)
    if why is not None:
        image.close()
        raise BadImage(file, *why)
    return image


def _unusable(image: Image.Image, max_pixels: int) -> tuple[str, str | None] | None:
    short, long = sorted(image.size)
    size = f"{image.width} x {image.height}"
    if short == 0:
        return "an image without pixels", size
    if short * long > max_pixels:
        return f"more than {max_pixels} pixels", size
    if long > MAX_RATIO * short:
        return f"more than {MAX_RATIO} times as long as wide", size
    if image.mode == "F":
        return "pixels in floating point, whose range is not known", None
    return None


def _decode(file: str | Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # as in ``_open``
        raise BadImage(file, "truncated or corrupt", error) from error


def _read_all(image: Image.Image) -> None:
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16 bits; convert() would clip them at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")
