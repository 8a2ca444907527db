"""Images from files: every kind that PIL reads becomes RGB, everything else is refused by name."""

import struct
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

# Raster formats only: PIL also knows formats that it hands to other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # 300 MB as RGB; photographs are far below
UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, OverflowError, struct.error, Image.DecompressionBombError)


class BadImage(ValueError):
    """An image that cannot be used; the message names the file and, after a colon, says why."""

    @property
    def why(self) -> str:
        return str(self).split(": ", 1)[-1]


def find_image(folder: str | Path, name: str) -> Path:
    """The file of an image inside its folder.

    Raises:
        BadImage: the name leads out of the folder, or to no file.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise BadImage(f"{name}: an image's name must stay inside the image folder")
    file = Path(folder, parts)
    if not file.is_file():
        raise BadImage(f"{file}: no such image")
    return file


def load_image(file: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as RGB. Of an animation, the first frame; CMYK, palettes, alpha and 16 bits are converted.

    Raises:
        BadImage: it is missing, truncated, no image, larger than ``max_pixels``, or has floating-point pixels.
    """
    with _open(file, max_pixels) as image:
        try:
            image.load()
        except UNREADABLE as error:
            raise BadImage(f"{file}: truncated or corrupt ({error})") from error
        if image.mode == "F":
            raise BadImage(f"{file}: pixels in floating point, whose range is not known")
        if image.mode.startswith("I"):  # 16 bits; convert() would clip them at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        return image.convert("RGB")


def check_image(file: str | Path, decode: bool = True, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image that can be used.

    Args:
        decode: whether to read the pixels as well, which finds truncated files. JPEGs are decoded at an eighth of their
            size, which reads all of the file and takes a fraction of the time.

    Raises:
        BadImage: as ``load_image``.
    """
    with _open(file, max_pixels) as image:
        size = image.size
        if image.mode == "F":
            raise BadImage(f"{file}: pixels in floating point, whose range is not known")
        if decode:
            try:
                image.draft("RGB", (size[0] // 8, size[1] // 8))
                image.load()
            except UNREADABLE as error:
                raise BadImage(f"{file}: truncated or corrupt ({error})") from error
        return size


def _open(file: str | Path, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # The limit below is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except FileNotFoundError as error:
        raise BadImage(f"{file}: no such image") from error
    except UNREADABLE as error:
        raise BadImage(f"{file}: not an image that can be read ({error})") from error
    if image.width * image.height > max_pixels:
        image.close()
        raise BadImage(f"{file}: {image.width} x {image.height} pixels are more than {max_pixels}")
    return image
