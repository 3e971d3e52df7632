"""Image loading: EXIF orientation, transparency, bit depth, size limits.

Every image, from a file or from memory, passes through `as_shown`, so regions and boxes are in the
pixels that an image viewer shows.
"""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

MAX_ASPECT = 200
"""Maximum aspect ratio; a narrower image, padded to a square, shows nothing."""
LONGEST = 8192
"""Longest side, in pixels, of an image that is padded to a square without downscaling. The memory
for the square grows with the side squared (3.3 GB for 16000 x 2000)."""
WIDEST = 64
"""Maximum aspect ratio of an image that is resized before its centre is cropped."""
FULL_SCALES = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Candidate values of white for integer and float images; the first that no pixel exceeds is used.
"""

_LENIENT = threading.Lock()


class BadImage(ValueError):
    """An image that cannot be used; `reason` is a short category that can be counted."""

    def __init__(self, reason: str, where: str, detail: str = "") -> None:
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}")
        self.reason = reason


def load_image(source: Path | bytes, name: str = "") -> Image.Image:
    """Decode an image file to RGB, as a viewer shows it (see `as_shown`).

    Args:
        source: Path, or the content of the file. Of an animation the first frame is read.
        name: Stands for the content in error messages.

    Raises:
        BadImage: If the image is missing, empty, truncated, of another format, too large to decode
            safely (Pillow's MAX_IMAGE_PIXELS) or narrower than 1 : 200.
    """
    where = str(source) if isinstance(source, Path) else name or "an image in memory"
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged tags
            with _refuse_truncated(), Image.open(file) as image:
                # Checked here, since other threads may change the filter for Pillow's warning.
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > limit:
                    size = f"{image.width} x {image.height} pixels"
                    raise BadImage("too large", where, f"{size}, the limit is {limit:,}; shrink it")
                if image.format == "EPS":
                    raise BadImage("not an image", where, "EPS is a program that draws one")
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise BadImage("too narrow", where, f"{image.width} x {image.height} pixels")
                return as_shown(image)
    except (BadImage, MemoryError):
        raise
    except FileNotFoundError:
        raise BadImage("missing", where, "there is no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage("too large", where, f"{error} Shrink it first.") from None
    except UnidentifiedImageError:
        raise BadImage("not an image", where) from None
    except Exception as error:  # Pillow's decoders raise any type for a damaged file
        raise BadImage("truncated or unreadable", where, str(error)) from None


def as_shown(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as a viewer shows it; returns the same object if nothing changes.

    Applies the EXIF orientation, composites transparency on white, and scales pixels of 16 bits and
    more to 8 bits instead of clipping them at 255 as Pillow does.
    """
    image.load()
    image = _upright(image)
    if image.mode[0] in FULL_SCALES:
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises any type for damaged data
        return image
    if orientation == 1:
        return image
    # Without the other tags: exif_transpose rewrites them all and fails on a damaged one.
    bare = image.copy()
    bare.info = {k: v for k, v in image.info.items() if k == "transparency"}
    bare.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(bare)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    values = np.where(np.isfinite(values), values, 0)
    scales = (65535,) if image.mode.startswith("I;16") else FULL_SCALES[image.mode[0]]
    highest = values.max()
    white = next((scale for scale in scales if highest <= scale), highest)
    return Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8))


def limit_size(image: Image.Image, padding: str) -> Image.Image:
    """Downscale (or for padding "crop" trim) an image whose square would take gigabytes.

    Args:
        image: RGB image of any size.
        padding: How the square is made, `pad` or `crop`; the image grid does not change.
    """
    if padding == "crop":
        reach = WIDEST * min(image.size)
        x, y = (max(edge - reach, 0) // 2 for edge in image.size)
        return image.crop((x, y, image.width - x, image.height - y)) if x or y else image
    if max(image.size) <= LONGEST:
        return image
    small = image.copy()
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC, reducing_gap=None)
    return small


@contextmanager
def _refuse_truncated() -> Iterator[None]:
    """Restore Pillow's default; lmms-eval makes it accept truncated files when it is imported."""
    with _LENIENT:  # read under the lock: another thread may have changed it for a while
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            try:
                yield
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = True
            return
    yield


def safe_join(root: Path, name: str) -> Path:
    """Join a path from an untrusted data file to a root folder.

    Raises:
        BadImage: If the result lies outside `root`.
    """
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # circular links, a NUL in the name
        raise BadImage("not a path", repr(name), str(error)) from None
    if not path.is_relative_to(root.resolve()):
        raise BadImage("outside the image folder", name)
    return path


def image_key(image: Image.Image) -> str:
    """Hash the pixels of an image; equal for equal pixels, whatever the file format."""
    rgb = as_shown(image)
    digest = hashlib.blake2b(rgb.tobytes(), digest_size=16)
    digest.update(str(rgb.size).encode())
    return digest.hexdigest()
