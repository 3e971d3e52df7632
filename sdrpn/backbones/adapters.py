"""Optional ways to load a base model: with a PEFT adapter, in 4 bits. Nothing here is required."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from sdrpn.io import hub
from sdrpn.io.checkpoint_files import first_line
from sdrpn.io.extras import needs

KEPT_WHOLE = ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.visual"]
"""Modules that 4-bit loading leaves as they are: small, and what the maps are made from."""


def four_bits(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for a language model in 4 bits (nf4) that computes in `dtype`.

    Raises MissingExtra where bitsandbytes is not installed.
    """
    needs("bitsandbytes", extra="4bit", what="load_in_4bit")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT_WHOLE,
    )
    return {"quantization_config": settings}


def with_adapter(model: Any, adapter: str, *, merge: bool = True) -> Any:
    """The model with a PEFT adapter's weights, from a folder or hub id.

    merge: add them to the base's own, so that nothing runs slower; a base in 4 bits cannot take
    them in and keeps them beside it. Raises ValueError that says what does not fit, MissingExtra
    where peft is not installed.
    """
    needs("peft", extra="peft", what=f"peft={adapter}")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns of weights it could not place, and would go on without them.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted: Any = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
    except Exception as error:  # PEFT raises many kinds for files that make no sense
        told = hub.explain(error, adapter) or first_line(error)[:300]
        raise ValueError(
            f"peft={adapter} cannot be put on the base model: {told}"
            "\nAdapters trained in the original LLaVA code: `sdrpn convert base FOLDER --base BASE "
            "--out NEW`, then pretrained=NEW."
        ) from error
    if not merge:
        return adapted.get_base_model()
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type
        raise ValueError(f"peft={adapter} is a {kind} adapter, which cannot be merged into a model")
    return adapted.merge_and_unload()
