"""Prompts as LLaVA-1.5 was trained with: each part between images encoded on its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from sdrpn.backbones.llava15 import Llava15
from sdrpn.backbones.plain_text import PlainText, encode_as_sentencepiece
from sdrpn.convert.tokenizer import read_tokenizer
from sdrpn.io.checkpoint_files import Source
from tests.conftest import make_llava
from tests.helpers.llama_tokenizers import llava_ids, random_texts, shuffle_pieces, train

PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FIRST = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
ALWAYS = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)


def hub_backend(**parts: Any) -> Tokenizer:
    """LLaVA-1.5's tokenizer.json on the hub in small: the same ids for what matters here."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {"▁▁": 259, "▁a": 263, "▁ro": 696, "ro": 307, "▁the": 278, "th": 386, "▁t": 260}
    vocabulary |= {"he": 354, "▁": 29871, "e": 29872, "t": 29873, "a": 29874, "r": 29878}
    vocabulary |= {"o": 29877, "h": 29882, ":": 29901, "<image>": 32000, "<pad>": 32001}
    merges = [("▁", "▁"), ("▁", "t"), ("▁", "a"), ("▁t", "he"), ("r", "o"), ("h", "e"), ("▁", "ro")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = parts.get("normalizer", PREPEND)
    backend.pre_tokenizer = parts.get("pre_tokenizer")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokens = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return backend


def hub_tokenizer(**parts: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=hub_backend(**parts),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def write_hub_files(folder: Path, **settings: Any) -> None:
    """As in llava-hf/llava-1.5-7b-hf: tokenizer.json, and settings that ask for `legacy=False`."""
    folder.mkdir(exist_ok=True)
    hub_backend().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config |= {"add_bos_token": True, "add_eos_token": False} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))


def parts_of(plain: PlainText, *parts: str) -> list[int]:
    return plain.ids(plain.mark.join(parts))


KINDS = {
    "as published": {},
    "legacy": {"normalizer": None, "pre_tokenizer": ALWAYS},
    "not legacy": {"normalizer": None, "pre_tokenizer": FIRST},
}
"""How transformers sets the one tokenizer up, by version and settings."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_break_behind_an_image_has_its_space(kind: str) -> None:
    plain = PlainText(hub_tokenizer(**KINDS[kind]), 32000)
    assert parts_of(plain, "a:", "\nthe") == [1, 263, 29901, 32000, 29871, 13, 29873, 354]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_start_with_a_space_keep_both(kind: str) -> None:
    """Sentencepiece puts its own before each part, whatever the part starts with."""
    plain = PlainText(hub_tokenizer(**KINDS[kind]), 32000)
    assert parts_of(plain, "a ", " ", "\nthe") == [
        *(1, 263, 29871, 32000),
        *(259, 32000),
        *(29871, 13, 29873, 354),
    ]
    assert parts_of(plain, "", " the", "ro", "▁a") == [
        *(1, 32000),
        *(259, 29873, 354, 32000),
        *(696, 32000),
        *(259, 29874),
    ]
    assert parts_of(plain, "") == [1]
    assert parts_of(plain, "", "") == [1, 32000]


def test_the_hub_s_own_files(tmp_path: Path) -> None:
    """Whatever the installed transformers makes of them."""
    write_hub_files(tmp_path)
    plain = PlainText(AutoTokenizer.from_pretrained(tmp_path), 32000)
    assert parts_of(plain, "a: ", "\nthe") == [1, 263, 29901, 29871, 32000, 29871, 13, 29873, 354]
    assert parts_of(plain, "", " the\n", "a") == [
        *(1, 32000),
        *(259, 29873, 354, 13, 32000, 263),
    ]


def test_a_loaded_model_has_them(tmp_path: Path) -> None:
    llava = make_llava()
    llava.model.resize_token_embeddings(32002, mean_resizing=False)
    llava.model.config.image_token_id = 32000
    llava.model.save_pretrained(tmp_path)
    llava.processor.save_pretrained(tmp_path)
    write_hub_files(tmp_path / "hub")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "hub" / name, tmp_path / name)
    loaded = Llava15.load(str(tmp_path), device="cpu", system_prompt="")
    assert list(loaded.prompt_ids("the").after[:4]) == [29871, 13, 29873, 354]
    ids = loaded.plain_ids("ro <image> a<image>", 2)
    first = ids.index(32000)
    assert ids[first - 1 : first + 4] == [29871, 32000, 259, 29874, 32000]


def test_no_start_token_where_the_tokenizer_has_none() -> None:
    tokenizer = hub_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A")
    assert parts_of(PlainText(tokenizer, 32000), "a", "a") == [263, 32000, 263]


def test_a_tokenizer_without_a_leading_space_is_refused() -> None:
    never = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    tokenizer = hub_tokenizer(normalizer=None, pre_tokenizer=never)
    with pytest.raises(ValueError, match="after an image") as error:
        PlainText(tokenizer, 32000, "my/llava")
    with pytest.raises(ValueError, match=r"^this model: its tokenizer encodes the line break"):
        PlainText(tokenizer, 32000)
    assert str(error.value) == (
        "my/llava: its tokenizer encodes the line break after an image as [13], but LLaVA-1.5 was "
        "trained with [29871, 13] (a '▁' first): use the tokenizer files of "
        "llava-hf/llava-1.5-7b-hf, or remove add_prefix_space from tokenizer_config.json"
    )


def test_a_vocabulary_without_bytes_or_spaces_is_not_llama_s() -> None:
    """Its line breaks are its own affair."""
    for words in ({"<unk>": 0, "▁": 1, "a": 2}, {"<unk>": 0, "<0x0A>": 1, "a": 2}):
        backend = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
        backend.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        assert parts_of(PlainText(tokenizer, 3), "a", "a") == [2, 3, 2]


def test_only_a_leading_space_is_changed() -> None:
    """Tokenizers of another kind, and words that Metaspace cuts, stay as they are."""
    cut = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    for splitter in (cut, pre_tokenizers.Whitespace()):
        tokenizer = hub_tokenizer(normalizer=None, pre_tokenizer=splitter)
        encode_as_sentencepiece(tokenizer)
        assert type(tokenizer.backend_tokenizer.pre_tokenizer) is type(splitter)
        assert tokenizer.backend_tokenizer.normalizer is None
    encode_as_sentencepiece(object())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SentencePieceProcessor]:
    """A folder with a tokenizer.model whose ids are in no order of their scores."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shuffle_pieces(train(folder / "tokenizer.model"))
    return folder, SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("legacy", [True, False])
def test_several_images_against_sentencepiece(pieces: Any, tmp_path: Path, legacy: bool) -> None:
    folder, processor = pieces
    read_tokenizer(Source(str(folder))).save_pretrained(tmp_path)
    plain = PlainText(LlamaTokenizer.from_pretrained(tmp_path, legacy=legacy), 520)
    texts = random_texts(1000, seed=2)
    for first, second, third in zip(texts, texts[1:], texts[2:], strict=False):
        expected = llava_ids(processor, [first, second, third], 520)
        assert parts_of(plain, first, second, third) == expected, (first, second, third)
