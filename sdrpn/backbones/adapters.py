"""Optional features of model loading: PEFT adapters and 4-bit quantization."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from sdrpn.io import hub
from sdrpn.io.checkpoint_files import first_line
from sdrpn.io.extras import needs

UNQUANTIZED_MODULES = [
    "lm_head",
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.visual",
]
"""Modules that 4-bit loading leaves in full precision: they are small, and the maps depend on
them."""


def quantization_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Build the arguments of from_pretrained for a 4-bit (NF4) language model.

    Args:
        dtype: Data type of computations.

    Raises:
        MissingExtra: If bitsandbytes is not installed.
    """
    needs("bitsandbytes", extra="4bit", what="load_in_4bit")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=UNQUANTIZED_MODULES,
    )
    return {"quantization_config": settings}


def load_adapter(model: Any, adapter: str, *, merge: bool = True) -> Any:
    """Load a PEFT adapter into a model.

    Args:
        model: The base model.
        adapter: Folder or Hub id of the adapter.
        merge: Merge the adapter into the base weights, which avoids its overhead; not possible for
            a 4-bit base.

    Returns:
        The model with the adapter.

    Raises:
        ValueError: If the adapter does not fit the model, or cannot be merged.
        MissingExtra: If peft is not installed.
    """
    needs("peft", extra="peft", what=f"peft={adapter}")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns about missing weights and leaves them out.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted: Any = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
    except Exception as error:  # PEFT raises many types for malformed files
        cause = hub.explain(error, adapter) or first_line(error)[:300]
        raise ValueError(
            f"peft={adapter} cannot be applied to the base model: {cause}"
            "\nFor adapters trained with the original LLaVA code, run `sdrpn convert base FOLDER "
            "--base BASE --out NEW` and set pretrained=NEW."
        ) from error
    if not merge:
        return adapted.get_base_model()
    if not hasattr(adapted, "merge_and_unload"):
        peft_type = adapted.peft_config["default"].peft_type
        raise ValueError(
            f"peft={adapter} is a {peft_type} adapter, which cannot be merged into a model"
        )
    return adapted.merge_and_unload()
