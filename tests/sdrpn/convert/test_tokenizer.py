"""Tokenizers of LLaVA checkpoints: the ids that the original code gave, from its own files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from sdrpn.backbones.plain_text import PlainText
from sdrpn.convert.tokenizer import read_tokenizer
from sdrpn.io.checkpoint_files import Source
from tests.helpers.llama_tokenizers import (
    random_texts,
    shuffle_pieces,
    slow_ids,
    train,
    write_settings,
)
from tests.sdrpn.backbones.test_prompt import write_hub_files

SIZE = 520


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model whose ids are in no order of their scores."""
    path = train(tmp_path_factory.mktemp("model") / "tokenizer.model")
    shuffle_pieces(path)
    return path


@pytest.fixture(scope="module")
def pieces(model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model))


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    write_settings(tmp_path)
    return tmp_path


def read(folder: Path) -> Any:
    return read_tokenizer(Source(str(folder)))


def saved(tokenizer: Any, folder: Path) -> Any:
    """The same, as a converted model brings it."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def write(folder: Path, name: str, values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


# --- pieces --------------------------------------------------------------------------------------


def test_ids_are_in_no_order_of_scores(pieces: SentencePieceProcessor) -> None:
    scores = [pieces.GetScore(i) for i in range(259, SIZE)]
    assert scores != sorted(scores, reverse=True)


def test_ids_are_sentencepieces_own(
    folder: Path, tmp_path: Path, pieces: SentencePieceProcessor
) -> None:
    made = read(folder)
    again = saved(made, tmp_path / "saved")
    for text in random_texts(3000, seed=1):
        expected = pieces.encode(text)
        assert ids(made, text) == expected, text
        assert ids(again, text) == expected, text


def test_merges_go_by_score_and_not_by_id(tmp_path: Path) -> None:
    """Against a second model of the same pieces: same merges, however the ids lie."""
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        shuffle_pieces(train(tmp_path / str(seed) / "tokenizer.model"), seed)
    one, two = (read(tmp_path / str(seed)) for seed in (1, 2))
    assert one.tokenize("the   total        of 12.50") == two.tokenize(
        "the   total        of 12.50"
    )
    assert one.get_vocab() != two.get_vocab()


def test_tokens_for_images_and_padding_come_last(folder: Path) -> None:
    made = read(folder)
    assert made.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<image>", "<pad>"]) == [
        *(0, 1, 2, 520, 521)
    ]
    assert (len(made), made.bos_token_id, made.eos_token_id, made.pad_token_id) == (522, 1, 2, 521)
    assert made.model_max_length == 2048
    assert made("a")["input_ids"][0] == 1
    assert made("a")["input_ids"][-1] != 2


def test_a_length_that_is_no_number_is_left_out(folder: Path) -> None:
    write_settings(folder, model_max_length="long")
    assert read(folder).model_max_length > 1 << 40


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["disc on", "red"]},
        {"user_defined_symbols": ["\u2581di"]},  # with the space before it
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    train(tmp_path / "tokenizer.model", size=400, **settings)
    with pytest.raises(ValueError, match="is not a LLaMA tokenizer") as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.model'} is not a LLaMA tokenizer ")
    assert "sentencepiece encodes '" in str(error.value)


# --- added words ---------------------------------------------------------------------------------

WORDS = {"<grasp>": 520, "kilo watt": 521, "<grasp>s": 522}
PARTS = ("<grasp>", "kilo watt", "<grasp>s", " ", "  ", " <gras", " kilo", "p>", " red", "blue")


def only_words(folder: Path) -> None:
    write(folder, "added_tokens.json", WORDS)


def told_apart(folder: Path) -> None:
    write(folder, "added_tokens.json", WORDS)
    token = {"content": "<grasp>s", "rstrip": True, "lstrip": False, "normalized": False}
    more = ["kilo watt", token]
    write(folder, "special_tokens_map.json", {"bos_token": "<s>", "extra": more, "pad": token})


def with_flags(folder: Path) -> None:
    write(folder, "added_tokens.json", WORDS)
    flags = (("<grasp>", False, False), ("kilo watt", True, False), ("<grasp>s", False, True))
    decoder = {"1": {"content": "<s>", "special": True}}
    for number, (text, left, right) in enumerate(flags, start=520):
        token = {"content": text, "lstrip": left, "rstrip": right, "normalized": True}
        decoder[str(number)] = token | {"single_word": False, "special": False}
    write_settings(folder, added_tokens_decoder=decoder)


@pytest.mark.parametrize(
    ("add", "strips"),
    [
        (only_words, ((True, True), (True, True), (True, True))),
        (told_apart, ((True, True), (True, True), (False, True))),
        (with_flags, ((False, False), (True, False), (False, True))),
    ],
)
def test_added_words_are_cut_as_the_slow_tokenizer_cut_them(
    folder: Path,
    tmp_path: Path,
    pieces: SentencePieceProcessor,
    add: Callable[[Path], None],
    strips: tuple[tuple[bool, bool], ...],
) -> None:
    add(folder)
    made = read(folder)
    assert made.convert_tokens_to_ids([*WORDS, "<image>", "<pad>"]) == [520, 521, 522, 523, 524]
    added = {
        word: (number, *pair) for (word, number), pair in zip(WORDS.items(), strips, strict=True)
    }
    for tokenizer in (made, saved(made, tmp_path / "saved")):
        plain = PlainText(tokenizer, 523)
        for text in random_texts(1500, seed=3, words=PARTS):
            assert plain.ids(text)[1:] == slow_ids(pieces, text, added), text


def test_what_special_tokens_map_says_of_a_word_is_followed(folder: Path) -> None:
    """Alone or in a list; a flag that it leaves out is off, one that nothing is said of is on."""
    words = ["<a>", "<b>", "<c>", "<d>"]
    write(folder, "added_tokens.json", {word: 520 + i for i, word in enumerate(words)})
    listed = [{"content": "<a>", "lstrip": True}, {"content": "<b>", "rstrip": True}, "<d>", 5]
    write(folder, "special_tokens_map.json", {"extra": listed, "pad_token": {"content": "<c>"}})
    added = read(folder).added_tokens_decoder
    assert [(added[n].content, added[n].lstrip, added[n].rstrip) for n in range(520, 524)] == [
        ("<a>", True, False),
        ("<b>", False, True),
        ("<c>", False, False),
        ("<d>", True, True),
    ]


def test_flags_of_an_added_word_are_kept(folder: Path) -> None:
    """Later ids first: their order in the file is none."""
    plain = {"content": "<b>", "special": True}
    alone = {"content": "<a>", "single_word": True, "lstrip": True, "rstrip": False}
    write_settings(folder, added_tokens_decoder={"521": plain, "520": alone})
    added = read(folder).added_tokens_decoder
    flags = ("content", "special", "single_word", "lstrip", "rstrip", "normalized")
    assert [getattr(added[520], name) for name in flags] == ["<a>", False, True, True, False, False]
    assert [getattr(added[521], name) for name in flags] == ["<b>", True, *[False] * 4]


def test_spaces_around_an_added_word_go(folder: Path, pieces: SentencePieceProcessor) -> None:
    write(folder, "added_tokens.json", {"<grasp>": 520})
    plain = PlainText(read(folder), 521)
    red, disc = pieces.encode("red"), pieces.encode("disc")
    assert plain.ids("red  <grasp>\n disc") == [1, *red, 520, *disc]
    assert plain.ids("red<grasp>disc") == [1, *red, 520, *disc]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"<a>": 520, "<b>": 522}, "added token '<b>' has the id 522, but the next free id is 521"),
        ({"<a>": 521}, "added token '<a>' has the id 521, but the next free id is 520"),
        ({"</s>": 520}, "added token '</s>' has the id 520, but the next free id is 520"),
        ({"<a>": "520"}, "added_tokens.json has no id for '<a>'"),
        ({"<a>": True}, "added_tokens.json has no id for '<a>'"),
    ],
)
def test_ids_that_would_shift_are_refused(folder: Path, words: Any, message: str) -> None:
    write(folder, "added_tokens.json", words)
    with pytest.raises(ValueError, match=re.escape(f"{folder}: {message}")):
        read(folder)


@pytest.mark.parametrize(
    "entry", [{"x": {"content": "<a>"}}, {"520": {}}, {"520": {"content": 3}}, {"520": "<a>"}]
)
def test_flags_that_make_no_sense_are_refused(folder: Path, entry: Any) -> None:
    write_settings(folder, added_tokens_decoder=entry)
    with pytest.raises(
        ValueError, match=r"added_tokens_decoder in tokenizer_config\.json has an entry"
    ):
        read(folder)


def test_flags_that_are_no_object_are_refused(folder: Path) -> None:
    write_settings(folder, added_tokens_decoder=["<a>"])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be an object, got a list"):
        read(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf{}", " starts with a byte order mark: save it as UTF-8 without one"),
        (b"{", " is not valid JSON: Expecting property name enclosed in double quotes"),
    ],
)
def test_files_that_transformers_cannot_read_are_named(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    write_hub_files(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"^cannot load ") as error:
        read(tmp_path)
    assert f": {tmp_path / file}{message}" in str(error.value)


def test_words_inside_the_vocabulary_are_let_be(folder: Path) -> None:
    write(folder, "added_tokens.json", {"<s>": 1, "</s>": 2, "<unk>": 0})
    assert len(read(folder)) == 522


def test_special_ones_are_text_in_a_question(folder: Path, pieces: SentencePieceProcessor) -> None:
    token = {"content": "<im_patch>", "special": True, "lstrip": False, "rstrip": False}
    write_settings(folder, added_tokens_decoder={"520": token})
    made = read(folder)
    assert made.convert_tokens_to_ids("<im_patch>") == 520
    assert PlainText(made, 521).ids("<im_patch>") == [1, *pieces.encode("<im_patch>")]
