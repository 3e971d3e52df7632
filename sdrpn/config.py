"""Constants and settings of the method, as frozen dataclasses that are saved with their results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args, get_type_hints

VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System prompt of LLaVA-1.5's training and published scores, missing in the Hub's template."""

IMAGE_TOKEN = "<image>"
"""Placeholder for an image in prompts, in LLaVA's data and in the tokenizer."""

ONE_WORD = "Answer the question using a single word or phrase."
"""What short answers are asked for with, in benchmarks and in LLaVA's data."""

Policy = Literal["mask", "bbox", "strongest"]
POLICIES: tuple[str, ...] = get_args(Policy)
Padding = Literal["pad", "crop"]
PADDINGS: tuple[str, ...] = get_args(Padding)
ASPECT_RATIO = "image_aspect_ratio"
"""Key of config.json, from the original LLaVA: how images are made square."""

NOTED_PADDINGS = {"pad": "pad", "square": "crop"}
"""Values of ASPECT_RATIO -> padding. `square` is resized and cropped by the CLIP processor."""

KINDS = ("natural", "text")
"""Kinds of pictures that labels are made of in different ways."""

Proposer = Literal["rpn", "attention", "vicrop", "none"]
PROPOSERS: tuple[str, ...] = get_args(Proposer)

PLAIN = {bool, float, int, str, type(None)}
"""Types of JSON scalars."""


def _from_mapping(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys of a JSON object against a dataclass; unknown keys raise ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be an object, got a {type(values).__name__}")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"unknown key(s) {', '.join(unknown)} in {cls.__name__}; known: {names}")
    return dict(values)


def _from_json(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys (`_from_mapping`) and the types of scalar values of a JSON object."""
    checked = _from_mapping(cls, values)
    for name, hint in get_type_hints(cls).items():
        kinds = set(get_args(hint) or (hint,))
        if name in checked and kinds <= PLAIN and not _is_one_of(checked[name], kinds):
            wanted = " or ".join(sorted("null" if k is type(None) else k.__name__ for k in kinds))
            raise ValueError(f"{name} must be {wanted}, got {str(checked[name])[:80]!r}")
    return checked


def _is_one_of(value: Any, kinds: set[type]) -> bool:
    """Whether a value has one of the types; integers count as floats, booleans do not."""
    if type(value) in kinds:
        return type(value) is not float or math.isfinite(value)
    return type(value) is int and float in kinds


PEAK = "peak"
"""Value of `ZoomConfig.threshold`: a threshold relative to the map's peak, see `peak_threshold`."""

TILES = (1, 2, 4)
"""Values of `ZoomConfig.tiles`."""


def _threshold(text: str) -> float | str:
    return text if text == PEAK else float(text)


_COUNTS = ("crop_tokens", "keep_tokens", "min_cells", "thin_above", "tiles")
_READ: Mapping[str, Any] = {**dict.fromkeys(_COUNTS, int), "threshold": _threshold}
"""Parsers of settings that are not floats."""


def _from_older(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translate zoom settings that earlier versions saved."""
    if not isinstance(values, Mapping):
        return values
    older = dict(values)
    if older.pop("relative", False) is True:
        older["threshold"] = PEAK  # the rule that replaced it
    if "max_crop_tokens" in older:
        older.setdefault("crop_tokens", older.pop("max_crop_tokens"))
    return older


@dataclass(frozen=True)
class ZoomConfig:
    """When to zoom, and how a RoI map becomes crops (SD-RPN, section 3.3; docs/method.md).

    Args:
        threshold: Threshold on the blurred map, in (0, 1), or `peak`: 0.3 of the map's peak, and no
            region if the map has no clear peak (Vision-RL2; one rule for all benchmarks).
        policy: `mask` (published results), `bbox` (published alternative) or `strongest` (ours).
        token_budget: Crop tokens per cell of the box, along each side, up to the model's grid; None
            inserts the full grid (576 tokens for LLaVA-1.5), as published.
        min_cells: Smaller connected components are dropped (published: 2, on a 24 x 24 grid).
        max_cells_fraction: Components larger than this share of the grid are dropped.
        skip_above: No zoom if the boxes cover this share of the image or more; None always zooms,
            as published.
        crop_tokens: Maximum number of crop tokens of a question. Larger crops keep the tokens of
            foreground cells only, and shrink if these are still too many; for Qwen2.5-VL, it also
            limits the crop's resolution. None: limited only by the model's context.
        tiles: 2 or 4 encode large regions as up to so many crops at the model's input size, and
            keep only tokens of foreground cells; 1 (published) encodes one crop.
        gate: The answer without a zoom stands if the probability of each of its tokens is at least
            this; None (published) never answers without a look.
        learned_gate: No zoom if the RPN's learned gate gives a lower probability that it helps;
            None (published) ignores the gate.
        keep_tokens: Number of image tokens, those with the highest RoI logits, that a zoomed answer
            attends to from layer B on; lower layers attend to all. None (published): all.
        thin_above: In images with more cells than this, drop those that no token of the question
            attends to before a zoomed answer (published for Qwen2.5-VL: 1024). The image is then
            prefilled again for that question. None: never, so that prefixes are always shared.
    """

    threshold: float | str = 0.15
    policy: str = "mask"
    token_budget: float | None = None
    min_cells: int = 2
    max_cells_fraction: float = 225 / 576
    skip_above: float | None = None
    crop_tokens: int | None = None
    tiles: int = 1
    gate: float | None = None
    learned_gate: float | None = None
    keep_tokens: int | None = None
    thin_above: int | None = None

    def __post_init__(self) -> None:
        if self.threshold != PEAK and not _is_share(self.threshold):
            if isinstance(self.threshold, str):
                raise ValueError(
                    f"threshold must be float, got {self.threshold!r}; the only other value is "
                    f"{PEAK!r}"
                )
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.token_budget is not None and self.token_budget <= 0:
            raise ValueError(f"token_budget must be above 0 or None, got {self.token_budget}")
        if self.skip_above is not None and not 0 < self.skip_above <= 1:
            raise ValueError(f"skip_above must be in (0, 1] or None, got {self.skip_above}")
        for name in ("gate", "learned_gate"):
            value = getattr(self, name)
            if value is not None and not _is_share(value):
                raise ValueError(f"{name} must be in (0, 1) or None, got {value}")
        for name in ("crop_tokens", "keep_tokens", "thin_above", "min_cells"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.tiles not in TILES:
            raise ValueError(f"tiles must be one of {', '.join(map(str, TILES))}, got {self.tiles}")
        if not 0 < self.max_cells_fraction <= 1:
            raise ValueError(f"max_cells_fraction must be in (0, 1], got {self.max_cells_fraction}")
        if self.keep_tokens is not None and self.thin_above is not None:
            raise ValueError("keep_tokens and thin_above both drop image tokens: give one of them")

    @property
    def threshold_text(self) -> str:
        """The threshold as users write it."""
        return self.threshold if isinstance(self.threshold, str) else f"{self.threshold:g}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**_from_json(cls, _from_older(values)))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse settings such as `threshold=0.1,policy=strongest`; empty text gives the defaults.

        Raises:
            ValueError: If a setting is unknown or invalid.
        """
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        values: dict[str, Any] = {name.strip(): value.strip() for name, _, value in pairs}
        checked = _from_mapping(cls, values)
        try:
            for name in checked.keys() - {"policy"}:
                read = _READ.get(name, float)
                checked[name] = None if checked[name] == "none" else read(checked[name])
            return cls.from_dict(checked)
        except (KeyError, ValueError) as error:
            raise ValueError(f"zoom settings {text!r}: {error}") from None


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1


@dataclass(frozen=True)
class MapRules:
    """Map post-processing that differs between model families (docs/method.md).

    Args:
        one_box: Policy `mask` always uses one box around all cells above the threshold and keeps
            their crop tokens; False: only for several components, within the size limits.
        dark_above: In grids with more cells, set the first quarters of the top row and of the left
            column to 0 before the blur, since large grids have sinks there; None: never.
        min_side: Crops with a shorter side, in source pixels, are refused.
        max_aspect: Crops with a larger aspect ratio are refused; None: unlimited.
    """

    one_box: bool = False
    dark_above: int | None = None
    min_side: int = 1
    max_aspect: float | None = None


SMALL_SQUARE = MapRules()
"""Rules of families that resize every image to one small square, such as LLaVA-1.5."""


@dataclass(frozen=True)
class LayerHeads:
    """Attention heads of one decoder layer, counted from 0; `heads=None` means all."""

    layer: int
    heads: tuple[int, ...] | None = None


def _layer_heads(values: Any) -> tuple[LayerHeads, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"heads must be a list, got a {type(values).__name__}")
    return tuple(v if isinstance(v, LayerHeads) else _one_layer(v) for v in values)


def _one_layer(value: Any) -> LayerHeads:
    checked = _from_json(LayerHeads, value)
    missing = [name for name in ("layer", "heads") if name not in checked]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing")
    heads = checked["heads"]
    counted = heads is None or (isinstance(heads, list | tuple) and all(map(_is_index, heads)))
    if not _is_index(checked["layer"]) or not counted:
        raise ValueError(f"layers and heads must be counted from 0, got {str(value)[:80]}")
    return LayerHeads(checked["layer"], None if heads is None else tuple(heads))


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class LabelConfig:
    """Attention heads and thresholds of pseudo-labels (docs/method.md).

    Args:
        grounding: Heads whose mean is the grounding map.
        sink: Heads whose mean is the sink map; without heads the map is 0.
        vicrop_layer: Layer that the ViCrop baseline reads.
        sink_threshold: Minimum value of a sink in the sink map.
        foreground: Threshold of foreground cells, as a share of the map's maximum.
        background: Upper threshold of background cells, as a share of the map's maximum.
        max_box_fraction: Samples are ignored if the foreground's box covers this share of the grid
            or more.
        max_components: Samples are ignored if the foreground has more connected components, since
            attention to several places is often wrong. Ours; None (published) keeps all.
        strongest: If given, only the component with the most attention is foreground, and all cells
            outside its box are background; samples are ignored where it has less than this share of
            the foreground's attention. Ours; None (published) labels all components.
        max_new_tokens: Maximum length of the answers whose attention is read.
        text_grounding: `grounding` for text images, which have no sink heads and unchanged
            prompts; if empty, `grounding` and `sink` are used for all images.
        instead: Replaces ONE_WORD in questions on natural images; empty: no change.
        box_margin: Cells by which the foreground's box is expanded on each side.
        padding_background: Label the padding of an image as background, never as foreground.
        floor: Samples are ignored if the maximum of their map is below this.
        read_cut_end: Read the last token of an answer cut at `max_new_tokens` too, which the
            model itself never attends from.
    """

    grounding: tuple[LayerHeads, ...]
    sink: tuple[LayerHeads, ...]
    vicrop_layer: int
    sink_threshold: float = 1e-3
    foreground: float = 0.2
    background: float = 0.1
    max_box_fraction: float = 0.5
    max_components: int | None = None
    strongest: float | None = None
    max_new_tokens: int = 128
    text_grounding: tuple[LayerHeads, ...] = ()
    instead: str = ""
    box_margin: int = 0
    padding_background: bool = False
    floor: float = 0.0
    read_cut_end: bool = True

    @property
    def heads(self) -> tuple[LayerHeads, ...]:
        """All attention heads that are read."""
        return (*self.grounding, *self.sink, *self.text_grounding)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        checked = _from_json(cls, values)
        missing = [name for name in ("grounding", "sink", "vicrop_layer") if name not in checked]
        if missing:
            raise ValueError(f"{missing[0]!r} is missing")
        for name in ("grounding", "sink", "text_grounding"):
            checked[name] = _layer_heads(checked.get(name, ()))
        return cls(**checked)

    def of(self, kind: str) -> LabelConfig:
        """Return the settings for one kind of images, `natural` or `text`."""
        if kind != "text" or not self.text_grounding:
            return self
        return replace(self, grounding=self.text_grounding, sink=(), instead="")

    def asked(self, question: str) -> str:
        """Return the prompt for a question that is to be labelled."""
        return question.replace(ONE_WORD, self.instead) if self.instead else question

    def check_fits(self, layers: int, heads: int, model: str) -> None:
        """Check that a model has all heads that are read.

        Args:
            layers: Layers of the model.
            heads: Attention heads per layer.
            model: Name, for the message.

        Raises:
            ValueError: If a head or layer does not exist.
        """
        read = [(one.layer, max(one.heads or (0,))) for one in self.heads]
        for layer, head in [*read, (self.vicrop_layer, 0)]:
            if layer >= layers or head >= heads:
                raise ValueError(
                    f"head {head} of layer {layer} is to be read, but {model} has {layers} layers "
                    f"of {heads} heads: these heads were found for another model"
                )


LABELS_7B = LabelConfig(
    grounding=(LayerHeads(14, (13, 24, 26)),), sink=(LayerHeads(2),), vicrop_layer=14
)
LABELS_13B = LabelConfig(
    grounding=(LayerHeads(13, (21, 23, 26)), LayerHeads(15, (2,)), LayerHeads(16, (2, 21, 30))),
    sink=(LayerHeads(16, (17, 22)),),
    vicrop_layer=14,
)


def published_labels(num_layers: int, hidden_size: int) -> LabelConfig | None:
    """Return the published head lists of LLaVA-1.5-7B and 13B; None for other shapes."""
    return {(32, 4096): LABELS_7B, (40, 5120): LABELS_13B}.get((num_layers, hidden_size))


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("image_tokens",)
"""Fields of `RPNConfig` that must be positive."""


@dataclass(frozen=True)
class RPNConfig:
    """Architecture and provenance of a region proposal network; saved as its config.json.

    Args:
        hidden_size: Hidden size of the backbone.
        intermediate_size: MLP size of the backbone.
        num_attention_heads: Attention heads of the backbone.
        num_key_value_heads: Key and value heads of the backbone.
        rms_norm_eps: Epsilon of the backbone's norms.
        image_tokens: Cells of the RoI map; None if they depend on the image.
        backbone: `model_type` of the family that provides the decoder layers.
        head_bias: Whether the projections of the map head have biases.
        rotary_head: Whether rotary embeddings are applied in the map head.
        final_norm: Whether a norm follows the decoder layers.
        branch_layer: B; the input is the output of backbone layers 0 to B-1.
        depth: R; R-1 decoder layers and a map head.
        multi_head: Mean over heads of q.k/sqrt(d); False: one unscaled dot product over the width.
        base_model: Name of the base model that it was trained on.
        base_hash: `fingerprint.base_hash` of that model; empty if unknown.
        zoom: Recommended zoom settings.
        labels: Settings of its training labels.
        sdrpn_version: Version that saved it.
        padding: Image padding in training, `pad` or `crop`; empty if unknown.
        gate: Whether there is a learned gate, see `ZoomConfig.learned_gate`.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    image_tokens: int | None
    backbone: str = "llava"
    head_bias: bool = False
    rotary_head: bool = False
    final_norm: bool = True
    branch_layer: int = 15
    depth: int = 3
    multi_head: bool = True
    base_model: str = ""
    base_hash: str = ""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    labels: LabelConfig | None = None
    sdrpn_version: str = ""
    padding: str = ""
    gate: bool = False

    def __post_init__(self) -> None:
        if self.padding not in ("", *PADDINGS):
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {self.padding!r}")
        if self.depth < 1 or self.branch_layer < 1:
            raise ValueError(
                f"branch_layer and depth must be 1 or more, got {self.branch_layer}, {self.depth}"
            )
        sizes = {name: getattr(self, name) for name in SIZES}
        if min(size for size in sizes.values() if size is not None) < 1:
            raise ValueError(f"sizes must be 1 or more, got {sizes}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of {heads} heads, and these of "
                f"{kv_heads} key and value heads"
            )
        if self.hidden_size // heads % 2:
            raise ValueError(f"heads of {self.hidden_size // heads} channels cannot be rotated")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        checked = _from_json(cls, values)
        checked["zoom"] = ZoomConfig.from_dict(checked.get("zoom", {}))
        if checked.get("labels") is not None:
            checked["labels"] = LabelConfig.from_dict(checked["labels"])
        return cls(**checked)
