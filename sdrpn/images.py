"""Image files, opened with care: what a viewer shows, or one sentence that says what is wrong."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

MAX_ASPECT = 200
"""Longest side over shortest; beyond it a picture padded to a square shows nothing."""

_LENIENT = threading.Lock()


class BadImage(ValueError):
    """An image that cannot be used; `reason` is short and fit for counting."""

    def __init__(self, reason: str, where: str, detail: str = "") -> None:
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}")
        self.reason = reason


def load_image(source: Path | bytes, name: str = "") -> Image.Image:
    """Decode an image file to RGB, turned as its EXIF data says.

    source: a path, or the file's bytes, which `name` then names in errors. Raises BadImage for one
    that is missing, empty, truncated, no image, too large to decode safely (Pillow's
    MAX_IMAGE_PIXELS), or narrower than 1 : 200.
    """
    where = str(source) if isinstance(source, Path) else name or "an image in memory"
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _no_half_images(), Image.open(file) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise BadImage("too narrow", where, f"{image.width} x {image.height} pixels")
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise BadImage("missing", where, "there is no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage("too large", where, str(error)) from None
    except UnidentifiedImageError:
        raise BadImage("not an image", where) from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        # Pillow raises all of these for files that are cut off or broken inside.
        raise BadImage("truncated or unreadable", where, str(error)) from None


@contextmanager
def _no_half_images() -> Iterator[None]:
    """Pillow as it is by itself: lmms-eval, once imported, lets it pass files that are cut off."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _LENIENT:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def inside(root: Path, name: str) -> Path:
    """root/name, refused where it would lead out of root: data files are not to be trusted."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise BadImage("outside the image folder", name)
    return path
