"""Images as a viewer shows them, or one sentence that says what is wrong; never too large for here.

Every image goes through `as_shown`, from a file or out of memory, so the pixels that regions and
boxes are counted in are the ones a viewer shows.
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
"""Longest side over shortest; beyond it a picture padded to a square shows nothing."""
LONGEST = 8192
"""Pixels a side that are padded to a square as they are: its memory grows with the side squared
(3.3 GB for 16000 x 2000)."""
WIDEST = 64
"""Times its shortest side that an image is resized at before its middle is cut out."""
FULL_SCALES = {"I": (255, 65535), "F": (1, 255, 65535)}
"""What white may be in images of numbers: the first that no pixel exceeds."""

_LENIENT = threading.Lock()


class BadImage(ValueError):
    """An image that cannot be used; `reason` is short and fit for counting."""

    def __init__(self, reason: str, where: str, detail: str = "") -> None:
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}")
        self.reason = reason


def load_image(source: Path | bytes, name: str = "") -> Image.Image:
    """Decode an image file to RGB, as a viewer shows it (`as_shown`); of an animation, its start.

    source: a path, or the file's bytes, which `name` then names in errors. Raises BadImage for one
    that is missing, empty, truncated, no image, too large to decode safely (Pillow's
    MAX_IMAGE_PIXELS), or narrower than 1 : 200.
    """
    where = str(source) if isinstance(source, Path) else name or "an image in memory"
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that are damaged
            with _no_half_images(), Image.open(file) as image:
                # Looked at here: other threads may change what becomes of Pillow's warning.
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
    except Exception as error:  # Pillow's readers raise any kind for a file that is damaged
        raise BadImage("truncated or unreadable", where, str(error)) from None


def as_shown(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it, in RGB; the image itself where it is that already.

    Turned as its EXIF data says. What is transparent lies on white. Pixels of 16 bits and more are
    scaled to 8 and not cut off at 255, which Pillow would do.
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
    except Exception:  # Pillow raises any kind for data that is damaged
        return image
    if orientation == 1:
        return image
    # With no other tag: Pillow would write them all anew, and fail over one that is damaged.
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


def bounded(image: Image.Image, padding: str) -> Image.Image:
    """The image, or for the first look a smaller one, where making a square would take gigabytes.

    padding: how the square will be made, as in `region.View`, whose geometry stays the same.
    """
    if padding == "crop":
        reach = WIDEST * min(image.size)
        unseen = tuple(max(edge - reach, 0) // 2 for edge in image.size)
        return ImageOps.crop(image, unseen) if any(unseen) else image
    if max(image.size) <= LONGEST:
        return image
    small = image.copy()
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC, reducing_gap=None)
    return small


@contextmanager
def _no_half_images() -> Iterator[None]:
    """Pillow as it is by itself: lmms-eval, once imported, lets it pass files that are cut off."""
    with _LENIENT:  # asked with the lock held: another thread may have it switched off for a while
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            try:
                yield
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = True
            return
    yield


def inside(root: Path, name: str) -> Path:
    """root/name, refused where it would lead out of root: data files are not to be trusted."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in the name
        raise BadImage("not a path", repr(name), str(error)) from None
    if not path.is_relative_to(root.resolve()):
        raise BadImage("outside the image folder", name)
    return path


def image_key(image: Image.Image) -> str:
    """A name for an image's content: equal for equal pixels, whatever file they came from."""
    rgb = as_shown(image)
    digest = hashlib.blake2b(rgb.tobytes(), digest_size=16)
    digest.update(str(rgb.size).encode())
    return digest.hexdigest()
