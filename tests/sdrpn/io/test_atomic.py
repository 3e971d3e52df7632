"""Atomic writes: what umask allows, and counts in sentences."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdrpn.backbones.loading import pick_dtype
from sdrpn.io.atomic import apply_umask, atomic_write, write_json
from sdrpn.io.plurals import counted
from sdrpn.rpn.checkpoint import RPN


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_mode_that_the_umask_allows(
    umask: int, perturbed_rpn: RPN, tmp_path: Path
) -> None:
    """safetensors writes 0600, so an RPN shared on a cluster could not be read by others."""
    perturbed_rpn.save_pretrained(tmp_path / "rpn")
    write_json(tmp_path / "one.json", {})
    with atomic_write(tmp_path / "two.safetensors") as part:
        save_file({"a": torch.zeros(1)}, part)
    save_file({"a": torch.zeros(1)}, tmp_path / "three.safetensors")
    apply_umask(tmp_path / "three.safetensors")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"rpn.safetensors", "config.json", "two.safetensors"}
    assert {path.name: oct(mode(path)) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


def test_a_count_agrees_with_its_noun() -> None:
    assert counted(1, "image") == "1 image"
    assert counted(0, "image") == "0 images"
    assert counted(2000, "byte", commas=True) == "2,000 bytes"


@pytest.mark.parametrize("name", ["float16", "torch.float16"])
def test_torch_s_own_name_of_a_dtype(name: str) -> None:
    assert pick_dtype(name, torch.device("cpu")) == torch.float16
