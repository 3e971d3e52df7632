"""Images of every kind, and files that are none: what a viewer shows is what the model sees."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.images import (
    LONGEST,
    WIDEST,
    BadImage,
    as_shown,
    image_key,
    limit_size,
    load_image,
    safe_join,
)
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.model import LlavaSdrpn
from sdrpn_eval.record import read_records
from tests.conftest import SIZES, THRESHOLD, make_image
from tests.helpers.fake_engine import FakeEngine

ORIENTATION = 0x0112
ZOOM = ZoomConfig(threshold=THRESHOLD, policy="strongest", min_cells=1)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
SCENE = Path(__file__).parents[3] / "docs" / "scene.png"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(dtype: Any, top: float) -> np.ndarray:
    """40 x 30, from 0 on the left to `top` on the right."""
    return np.broadcast_to(np.linspace(0, top, 40), (30, 40)).astype(dtype)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


# --- what a viewer shows ------------------------------------------------------------------------

DEEP = {
    "16-bit PNG": encoded(Image.fromarray(ramp(np.uint16, 65535)), "PNG"),
    "16-bit TIFF": encoded(Image.fromarray(ramp(np.uint16, 65535)), "TIFF"),
    "16-bit PGM": b"P5 40 30 65535\n" + ramp(">u2", 65535).tobytes(),
    "32-bit TIFF": encoded(Image.fromarray(ramp(np.int32, 10**9)), "TIFF"),
    "32-bit TIFF of bytes": encoded(Image.fromarray(ramp(np.int32, 255)), "TIFF"),
    "float TIFF up to 1": encoded(Image.fromarray(ramp(np.float32, 1)), "TIFF"),
    "float TIFF up to 255": encoded(Image.fromarray(ramp(np.float32, 255)), "TIFF"),
    "float TIFF up to 65535": encoded(Image.fromarray(ramp(np.float32, 65535)), "TIFF"),
    "8-bit PNG": encoded(Image.fromarray(ramp(np.uint8, 255)), "PNG"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pixels_are_scaled_not_cut_off(name: str) -> None:
    shown = np.asarray(load_image(DEEP[name]), dtype=int)
    assert shown.shape == (30, 40, 3)
    assert np.abs(shown - ramp(float, 255)[..., None]).max() <= 1


def test_broken_numbers_are_black() -> None:
    values = ramp(np.float32, 1)
    values[0, :3] = np.nan, np.inf, -np.inf
    values[1, 0] = -7
    shown = np.asarray(as_shown(Image.fromarray(values)))
    assert shown[0, :3].max() == shown[1, 0].max() == 0
    assert shown[0, 39].min() == 255
    assert np.asarray(as_shown(Image.fromarray(np.zeros((2, 2), np.float32)))).max() == 0


def half_transparent(mode: str) -> Image.Image:
    """Red on the left; on the right transparent, with black hidden below it."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 30))
    return image.convert(mode)


def palette(transparency: Any) -> Image.Image:
    image = Image.new("P", (40, 30), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(0, (0, 0, 20, 30))
    image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    "content",
    [
        encoded(half_transparent("RGBA"), "PNG"),
        encoded(half_transparent("RGBA"), "WEBP", lossless=True),
        encoded(palette(1), "PNG", transparency=1),
        encoded(palette(b"\xff\x00"), "PNG", transparency=b"\xff\x00"),
        encoded(palette(1), "GIF", transparency=1),
        encoded(half_transparent("RGB"), "PNG", transparency=BLACK),
    ],
    ids=["RGBA", "WebP", "palette index", "palette alphas", "GIF", "RGB with a colour key"],
)
def test_what_is_transparent_lies_on_white(content: bytes) -> None:
    shown = load_image(content)
    assert shown.getpixel((5, 5)) == (255, 0, 0)
    assert shown.getpixel((35, 5)) == WHITE


def test_half_transparent_pixels_are_mixed() -> None:
    for image in (Image.new("RGBA", (3, 3), (0, 0, 0, 128)), Image.new("LA", (3, 3), (0, 128))):
        assert as_shown(image).getpixel((1, 1)) == (127, 127, 127)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_printers_colours(kind: str) -> None:
    """CMYK, as a JPEG inverted the way Adobe does it."""
    ink = Image.new("CMYK", (40, 30), (0, 255, 255, 0))
    red, green, blue = load_image(encoded(ink, kind)).getpixel((5, 5))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 20


@pytest.mark.parametrize("mode", ["1", "L", "P", "LAB", "YCbCr", "HSV", "RGBX", "PA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = Image.fromarray(ramp(np.uint8, 255))
    if mode == "LAB":
        rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(grey.convert("RGB"), rgb, lab, outputMode="LAB")
        assert image is not None
    else:
        image = (
            grey.convert("RGB").convert(mode) if mode in ("HSV", "YCbCr") else grey.convert(mode)
        )
    shown = as_shown(image)
    assert (shown.mode, shown.size) == ("RGB", (40, 30))
    assert shown.getpixel((0, 3))[0] < 20  # type: ignore[index]
    assert shown.getpixel((39, 3))[0] > 235  # type: ignore[index]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_shows_its_first_picture(kind: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    shown = load_image(content)
    assert (shown.size, shown.getpixel((5, 5))) == ((40, 30), (255, 0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(kind: str, orientation: int) -> None:
    """A picture is stored so that its orientation brings it back: red is always top left."""
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste((255, 0, 0), (0, 0, 10, 10))
    way = Image.Transpose
    undo = {
        2: way.FLIP_LEFT_RIGHT,
        3: way.ROTATE_180,
        4: way.FLIP_TOP_BOTTOM,
        5: way.TRANSPOSE,
        6: way.ROTATE_90,
        7: way.TRANSVERSE,
        8: way.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    content = encoded(stored, kind, exif=turned(orientation))
    for shown in (
        load_image(content),
        as_shown(Image.open(io.BytesIO(content))),
        as_shown(Image.open(io.BytesIO(content)).convert("RGB")),  # as benchmarks do it
        as_shown(load_image(content)),  # turned once, not twice
    ):
        assert shown.size == (40, 20)
        assert shown.getpixel((3, 3))[0] > 200  # type: ignore[index]
        assert shown.getpixel((37, 17))[0] < 50  # type: ignore[index]


def test_deep_and_transparent_and_turned_at_once() -> None:
    image = Image.fromarray(ramp(np.uint16, 65535))
    assert load_image(encoded(image, "PNG", exif=turned(6))).size == (30, 40)
    shown = load_image(encoded(half_transparent("RGBA"), "PNG", exif=turned(6)))
    assert (shown.size, shown.getpixel((5, 35))) == ((30, 40), WHITE)


def test_exif_that_is_damaged_is_passed_over() -> None:
    """Its orientation counts nonsense; the picture is shown as it is stored."""
    content = encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=turned(6))
    at = content.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 8, b"MM\0*\xff\xff\xff\xff", content[at : at + 8] + b"\xff" * 12):
        broken = content[:at] + damage + content[at + len(damage) :]
        assert load_image(broken).size in ((40, 20), (20, 40))


def test_a_damaged_tag_beside_the_orientation_does_no_harm() -> None:
    """Pillow writes the other tags anew when it turns a picture, and fails over this one."""
    exif = turned(6)
    exif[0x010E] = "a description"
    content = encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)
    described, height = (struct.pack(">HH", tag, 2) for tag in (0x010E, 0x0101))
    assert content.count(described) == 1
    broken = content.replace(described, height)  # a height that is text
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(from_file(broken))
    assert load_image(broken).size == (20, 40)


def test_an_rgb_image_is_taken_as_it_is() -> None:
    image = make_image(40, 30, 0)
    assert as_shown(image) is image
    assert Question("?", (image,)).images[0] is image


# --- files that cannot be used -------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head promises a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def whole(kind: str) -> bytes:
    return encoded(make_image(60, 60, 0), kind)


TRUNCATED = "truncated or unreadable"
REFUSED = {
    "no bytes": (b"", "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "0 x 10": (png_claiming(0, 10), "not an image"),
    "30000 x 20000": (png_claiming(30000, 20000), "too large"),
    "10000 x 9000": (png_claiming(10000, 9000), "too large"),
    "2^31 x 2^31": (png_claiming(2**31 - 1, 2**31 - 1), "too large"),
    "1 x 10000": (encoded(Image.new("L", (1, 10000)), "PNG"), "too narrow"),
    "10000 x 49": (encoded(Image.new("L", (10000, 49)), "PNG"), "too narrow"),
    "half a PNG": (whole("PNG")[: len(whole("PNG")) // 2], TRUNCATED),
    "half a GIF": (whole("GIF")[:1200], TRUNCATED),
} | {
    f"a {kind} without its end": (whole(kind)[:-40], TRUNCATED) for kind in ("JPEG", "BMP", "WEBP")
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    (tmp_path / "a.png").write_bytes(content)
    for load in (lambda: load_image(tmp_path / "a.png"), lambda: load_image(content, "a.png")):
        with pytest.raises(BadImage) as error:
            load()
        assert error.value.reason == reason
        assert f"a.png: {reason}" in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"gone\.png: missing \(there is no such file\)"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(BadImage, match=r"truncated or unreadable .*directory"):
        load_image(tmp_path)


def test_the_smallest_is_an_image() -> None:
    assert load_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (
        255,
        0,
        0,
    )


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "b/../../a.png", "out/a.png"])
def test_paths_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(BadImage, match="outside the image folder"):
        safe_join(root, name)
    assert safe_join(root, "b/../a.png") == root.resolve() / "a.png"


def test_names_that_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    for name in ("a\0b.png", "round/a.png"):
        with pytest.raises(BadImage) as error:
            load_image(safe_join(tmp_path, name))
        assert "\0" not in str(error.value)


FILES = [
    encoded(make_image(24, 31, 0), "PNG", exif=turned(6)),
    encoded(palette(1), "PNG", transparency=1),
    DEEP["16-bit PNG"],
    encoded(make_image(24, 31, 0), "JPEG", exif=turned(6)),
    encoded(half_transparent("RGBA"), "WEBP"),
    encoded(make_image(24, 31, 0), "TIFF", exif=turned(6)),
    encoded(palette(1), "GIF"),
    encoded(make_image(24, 31, 0), "BMP"),
    encoded(half_transparent("RGBA"), "DDS"),
    encoded(make_image(24, 31, 0).convert("F"), "SPIDER"),
]
EDITS = st.tuples(st.integers(0, 4000), st.integers(0, 8), st.binary(max_size=8))


@settings(max_examples=400)
@given(file=st.sampled_from(FILES), edits=st.lists(EDITS, min_size=1, max_size=4))
@example(file=FILES[8], edits=[(80, 4, b"\0\0\0\0")])
def test_damaged_files_give_a_picture_or_one_sentence(
    file: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    """Bytes cut out and put in anywhere: an RGB picture or BadImage, whatever Pillow raises."""
    content = bytearray(file)
    for at, length, put in edits:
        at %= len(content) + 1
        content[at : at + length] = put
    shown = Image.new("RGB", (1, 1))
    with contextlib.suppress(BadImage):
        shown = load_image(bytes(content), "damaged")
    assert shown.mode == "RGB"
    assert min(shown.size) > 0


# --- the first look at a bounded cost ------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES, (LONGEST, 3), (4000, 3000)])
@pytest.mark.parametrize("padding", ["pad", "crop"])
def test_ordinary_images_are_looked_at_as_they_are(size: tuple[int, int], padding: str) -> None:
    image = Image.new("RGB", size)
    ordinary = padding == "pad" or max(size) <= WIDEST * min(size)
    assert (limit_size(image, padding) is image) == ordinary


@pytest.mark.parametrize("size", [(1, 10000), (10000, 1), (1, 1_000_000), (20000, 1500)])
def test_what_is_padded_is_bounded(size: tuple[int, int]) -> None:
    small = limit_size(Image.new("RGB", size), "pad")
    assert max(small.size) == LONGEST
    assert min(small.size) == max(round(min(size) * LONGEST / max(size)), 1)


@pytest.mark.usefixtures("small_squares")
@pytest.mark.parametrize("padding", ["pad", "crop"])
def test_huge_squares_are_not_made(llava: Llava15, padding: str) -> None:
    """A million pixels high, padded to a square they would be a million million; and resized to
    the model's side a third of a thousand million."""
    image = Image.new("RGB", (1, 1_000_000), (200, 30, 30))
    one = Llava15(llava.model, llava.processor, padding=padding)
    assert one.pixels([image]).shape == (1, 3, 112, 112)
    assert one.image_grid(image).size == (1, 1_000_000)
    box = PixelBox(0, 0, 1, 1_000_000)
    assert one.crop_input(image, box).pixels.shape == (3, 112, 112)


def test_a_shrunk_image_is_seen_the_same(llava: Llava15, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrunk first, then padded and resized: the model's pixels hardly move."""
    image = make_image(900, 400, 1)
    plain = llava.pixels([image])
    monkeypatch.setattr("sdrpn.io.images.LONGEST", 450)
    shrunk = llava.pixels([image])
    assert not plain.equal(shrunk)
    assert (plain - shrunk).abs().mean() < 0.03


def test_a_cropped_view_shows_the_middle(llava: Llava15, monkeypatch: pytest.MonkeyPatch) -> None:
    crop = Llava15(llava.model, llava.processor, padding="crop")
    image = make_image(1000, 100, 1)
    plain = crop.pixels([image])
    monkeypatch.setattr("sdrpn.io.images.WIDEST", 3)
    assert limit_size(image, "crop").size == (300, 100)
    assert (plain - crop.pixels([image])).abs().mean() < 0.03


# --- asked ---------------------------------------------------------------------------------------


@pytest.fixture
def small_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest square that is padded, small enough for a test."""
    monkeypatch.setattr("sdrpn.io.images.LONGEST", 1024)


@pytest.fixture(scope="module")
def engine(llava: Llava15, perturbed_rpn: RPN) -> ZoomModel:
    return ZoomModel(llava, perturbed_rpn, zoom=ZOOM)


def from_file(content: bytes) -> Image.Image:
    """As a caller has it: opened, and not decoded yet."""
    return Image.open(io.BytesIO(content))


ODD: dict[str, Callable[[], Image.Image]] = {
    "1 x 1": lambda: Image.new("RGB", (1, 1), "red"),
    "2 x 3": lambda: make_image(2, 3, 0),
    "1 x 10000": lambda: make_image(1, 10000, 0),
    "10000 x 1": lambda: make_image(10000, 1, 0),
    "1 x 300": lambda: make_image(1, 300, 0),
    "300 x 2": lambda: make_image(300, 2, 0),
    "grey": lambda: make_image(40, 30, 0).convert("L"),
    "black and white": lambda: make_image(40, 30, 0).convert("1"),
    "16-bit": lambda: from_file(DEEP["16-bit PNG"]),
    "CMYK": lambda: from_file(encoded(make_image(40, 30, 0).convert("CMYK"), "JPEG")),
    "palette": lambda: from_file(encoded(palette(1), "GIF", transparency=1)),
    "transparent": lambda: half_transparent("RGBA"),
    "turned": lambda: from_file(encoded(make_image(90, 30, 0), "JPEG", exif=turned(6))),
}


@pytest.mark.usefixtures("small_squares")
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("proposer", ["rpn", "vicrop"])
def test_odd_images_are_answered_as_they_are_shown(
    engine: ZoomModel, llava: Llava15, name: str, proposer: str
) -> None:
    """As their RGB picture is; regions inside it, and where there is one, crop tokens."""
    zoom = engine if proposer == "rpn" else ZoomModel(llava, proposer="vicrop")
    image = ODD[name]()
    plain = as_shown(ODD[name]())
    # Through an array: nothing but pixels is left.
    bare = Image.fromarray(np.asarray(plain).copy())
    first, second = zoom.ask_batch(
        [Question("yellow", (one,)) for one in (image, bare)], {"max_new_tokens": 2}
    )
    assert (first.text, first.regions) == (second.text, second.regions)
    assert image_key(image) == image_key(bare)
    assert zoom.backbone.image_grid(image) == zoom.backbone.image_grid(bare)
    assert bool(first.regions) == (first.reason is None) == (first.crop_tokens > 0)
    for x0, y0, x1, y1 in first.regions:
        assert 0 <= x0 < x1 <= plain.width
        assert 0 <= y0 < y1 <= plain.height
    whole = PixelBox(0, 0, *plain.size)
    boxed = zoom.ask(image, "yellow", box=whole, max_new_tokens=2)
    assert (boxed.regions, boxed.crop_tokens) == ((whole,), llava.image_tokens)


def test_a_box_counts_pixels_of_the_picture_as_shown(engine: ZoomModel) -> None:
    """A picture of 40 x 20 that is stored on its side: x goes up to 40."""
    picture = make_image(40, 20, 0)
    stored = picture.transpose(Image.Transpose.ROTATE_90)
    stored = from_file(encoded(stored, "PNG", exif=turned(6)))
    assert stored.size == (20, 40)
    box = PixelBox(25, 0, 40, 20)
    first = engine.ask(stored, "yellow", box=box, max_new_tokens=2)
    second = engine.ask(picture, "yellow", box=box, max_new_tokens=2)
    assert (first.text, first.regions) == (second.text, second.regions)
    with pytest.raises(ValueError, match="does not lie inside the 40 x 20 image"):
        engine.ask(stored, "yellow", box=PixelBox(0, 25, 20, 40))


def test_deep_images_that_differ_are_not_taken_for_one_another(llava: Llava15) -> None:
    """Cut off at 255, both would be white all over."""
    images = [Image.fromarray(ramp(np.uint16, 65535)[:, ::step] | 256) for step in (1, -1)]
    zoom = ZoomModel(llava, proposer="none")
    first, second = zoom.prefill(images)
    assert image_key(images[0]) != image_key(images[1])
    assert not first.kv[-1][0].equal(second.kv[-1][0])


def test_the_plugin_asks_about_what_is_shown(tmp_path: Path) -> None:
    """Images come decoded, with their EXIF data still to follow; the record counts as they do."""
    stored = from_file(encoded(make_image(90, 30, 0), "JPEG", exif=turned(6)))
    docs = [{"image": stored}, {"image": Image.fromarray(ramp(np.uint16, 65535))}]
    engine = FakeEngine()
    lm = LlavaSdrpn(pretrained=engine, batch_size=2, record=str(tmp_path))
    lm.task_dict = {"mine": {"test": docs}}

    def request(i: int) -> Any:
        args = ("?", {"max_new_tokens": 2}, lambda doc: [doc["image"]], i, "mine", "test")
        return SimpleNamespace(args=args, metadata={})

    lm.generate_until([request(0), request(1)])
    asked = {q.images[0].size: q.images[0] for batch in engine.batches for q in batch}
    assert set(asked) == {(30, 90), (40, 30)}
    assert asked[40, 30].getpixel((20, 0)) == (131, 131, 131)
    sizes = [line.size for line in read_records(tmp_path)]
    assert json.dumps(sizes) == "[[30, 90], [40, 30]]"
