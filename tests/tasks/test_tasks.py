"""The tasks: reading V*'s answers, its categories, tiny_vstar's metrics, local data, thresholds."""

from __future__ import annotations

import base64
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets import Image as ImageColumn
from hypothesis import given
from hypothesis import strategies as st
from lmms_eval.utils import load_yaml_config
from PIL import Image

from sdrpn_eval import scoring, tasks_info
from tests.helpers.local_benchmarks import (
    VSTAR_ENDING,
    docvqa_rows,
    hrbench_rows,
    manager,
    task_utils,
    textvqa_rows,
    vstar_rows,
    vstar_true_rows,
    write,
)

vstar = task_utils("vstar")
hrbench = task_utils("hrbench")
tiny_vstar, tiny_trio = task_utils("tiny_vstar"), task_utils("tiny_trio")
PINNED = ["B", "C", "A"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SDRPN_DATA with nothing in it yet, and no hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


# V*: the letter


NAMED = {
    "A": [
        "A",
        "a",
        "(A)",
        "A.",
        "A is correct",
        "A. A dog",
        "The answer is A because a dog is there",
        "The answer is (a)",
        "Answer: a",
        "the answer is a.",
        "a) red",
        "a. red",
        "(a)",
        "A. red",
        "A because it is red",
        "The answer is A, I think.",
        "The answer is A.\nB is a cat.",
        "A\nred",
        "A, as the car is red",
        "Option A",
        "Option A red",
        "The answer is A, not B",
        "A rather than B",
        "A, not B",
        "Answer: A. red",
        "The answer is: A",
        "A and not B",
        "A) red, as in the picture",
        "A.\n\nThe car is red.",
        "It is A, not B or C.",
        "Answer: A\n\nB is wrong.",
    ],
    "B": [
        "b",
        "B. blue",
        "B: blue",
        "ANSWER: (B)",
        "The answer is B.",
        "I would say (B), as the glove is blue.",
        "It is B",
        "**B**",
        "The answer is (b)",
        "(b)",
        "b)",
        "answer is b",
        "Answer: b.",
        "The answer is b",
        "Option B: the dog",
        "The correct option is B",
        "(A) red (B) blue (C) green. So the answer is B",
        "A. red B. blue C. green D. white. The answer is B.",
        "B, B",
        "(B) B.",
        "The correct answer is (B) blue",
        "B) blue. The answer is B",
        "Option B is correct.",
        "It is not A but B",
        "The answer is **B**",
        "The answer to this question is B.",
        "Answer: 'B'",
        "'B'",
        '"B"',
        "The answer is option B.",
        "The answer is probably B",
        "I choose B",
        "I would pick (b).",
        "Answer:B",
        "answer is [b]",
        "\\boxed{B}",
        "The options are A, B, C and D. The answer is B.",
        "Both A and C are wrong. The answer is B.",
        "Therefore, B.",
        "Not A. The answer is B.",
        "(B) blue",
        "B - blue",
        "b: blue",
        "Answer (b)",
        "The best choice is B.",
        "The letter is B",
        "Its colour is blue, so the answer is b.",
        "In the U.S.A. it is B",
        "Answer - B",
    ],
    "C": [
        "(C)",
        "C) the left one",
        "Answer: C",
        "The correct option is C",
        "The right answer is C, since A and B are red",
    ],
    None: [
        "Blue",
        "blue",
        "A dog",
        "Answer: A dog",
        "Cat and dog",
        "(A) or (B)",
        "E",
        "",
        "The color of the glove is black.",
        "Don't know",
        "The answer is A, B, C or D.",
        "Answer: A and C",
        "A or B",
        "either A or B",
        "Either A or B.",
        "not A",
        "Not A",
        "A or maybe B",
        "A/B",
        "a red car",
        "A red car",
        "A Red car",
        "The answer is A or B",
        "The answer is either A or B.",
        "The answer is a or b",
        "answer: b or c",
        "A maybe B",
        "A, maybe B.",
        "It is A or B.",
        "A perhaps B",
        "neither A nor B",
        "The answer is not A",
        "The answer isn't A",
        "A is wrong",
        "A is not correct.",
        "I don't think it is A",
        "The answer is A (or B)",
        "The answers are A and B",
        "A, B",
        "A & B",
        "A|B",
        "A-D",
        "A to D",
        "Between A and B",
        "The answer is a red car",
        "the answer is a dog",
        "It is a b c",
        "A vs B",
        "Either it is A, or it could be B.",
        "A. red\nB. blue",
        "A) red B) blue",
        "The answer is A. Actually, the answer is B.",
        "(A) and (B) are correct",
        "Both A and B are correct",
        "Could be A. Could be B.",
        "A? B?",
        "A... or B.",
        "a or b",
        "either (a) or (b)",
        "(a) or b",
        "A-frame house",
        "C'est bleu",
        "D.C.",
        "Answer: E",
        "The answer is A/B",
        "Answer: A, B",
        "The answer is none of A, B, C or D",
        "cannot be A",
        "not A or B",
        "Not (b)",
        "A but maybe B",
        "A nor B",
        "All of A, B, C, D",
        "Answer: A; B",
        "A; B",
        "A\nB",
        "A B C D",
        "ABCD",
        "a, b",
        "a/b",
        "(a)/(b)",
        "The answer is A, or B",
        "A and B",
        "B or A.",
        "Answer: (A) or (B)",
        "Answer: A or C.",
        "The answer is A or possibly B",
        "A, B, or C",
        "Possibly A or B",
        "A or (B)",
        "I can't tell",
        "an apple",
    ],
}
"""Responses to a question that offers A to D, by the letter they name."""


@pytest.mark.parametrize(
    ("response", "letter"), [(one, letter) for letter, several in NAMED.items() for one in several]
)
def test_letter_of_a_response(response: str, letter: str | None) -> None:
    assert scoring.answer_letter(response, set("ABCD")) == letter


CONCLUSIONS = [
    "So it is a letter B",
    *(
        "The correct one is B",
        "The right option is b.",
        "The best choice: B",
        "Correct letter: (b)",
    ),
    *(
        "The right choices are B, B",
        "I choose B",
        "I chose B.",
        "I pick B!",
        "I select B",
        "I say B",
    ),
    *(
        "I would go with B",
        "Going with the B",
        "I am going with option B",
        "I pick  B",
        "B is right.",
    ),
    *(
        "B is correct",
        "B is the answer",
        "B is  the best",
        "B and B are both the answers",
        "B is true",
    ),
    *("So B", "So it is B.", "Therefore, B", "Thus  B.", "Hence it must be B!", "so it  is  B..."),
    *(
        "The answer could be B",
        "Answer might be b",
        "The answer may be B",
        "Answers: B",
        "Answer B",
    ),
    *("The answer should be B", "The answer must be B", "An answer will be b", "The answer was B"),
    *("The answers are B", "The answer would be B", "The answer to the question, then, is B"),
]
"""How a response that has named A and C says that B is the answer."""
FILLING = (
    "the option choice letter either both most probably likely maybe perhaps possibly definitely "
)
FILLING += "clearly certainly simply just also even"
JOINING = ", / & | + - ; or and nor to through versus vs vs. maybe perhaps possibly probably"
NEGATIONS = [
    *("not A", "neither A", "never A", "without A", "except A", "cannot be A", "unlike A"),
    *("none of A", "rather than A", "instead  of A", "It can't be A", "I don't believe it is A"),
    *("I wouldn't say A", "I don't think that  it is A", "I don't think the answer is A", "not  A"),
    *("A is not", "A is incorrect", "A was wrong", "A seems false", "A looks unlikely", "not (a)"),
    *("A would  be impossible", "A isn't it", "Options A and B are wrong", "Option A is wrong"),
    *("Choice A is false", "A or B are not it", "not the A", "I don't think it are A, B or C"),
]
LETTERS_WITH_WORDS = (
    "is was are be would could might may should must can seems looks appears because "
)
LETTERS_WITH_WORDS += (
    "since as and or nor but though although if unless then than rather instead maybe "
)
LETTERS_WITH_WORDS += (
    "perhaps possibly probably likely also either not versus vs to in on at of by from "
)
LETTERS_WITH_WORDS += "with for it this that the only"


@pytest.mark.parametrize("said", CONCLUSIONS)
def test_a_response_that_names_all_and_concludes_names_one(said: str) -> None:
    assert scoring.answer_letter(f"(A) red (C) blue. {said}", set("ABC")) == "B"


@pytest.mark.parametrize("said", ["B is not true", "I do not choose B", "B, so C", "So B or C"])
def test_a_conclusion_that_is_none(said: str) -> None:
    assert scoring.answer_letter(f"(A) red (C) blue. {said}", set("ABC")) != "B"


@pytest.mark.parametrize("word", FILLING.split())
def test_words_between_answer_and_letter(word: str) -> None:
    assert scoring.answer_letter(f"(A) red. The answer is {word} B", set("AB")) == "B"
    assert scoring.answer_letter(f"The answer is A or {word}  B", set("AB")) is None


@pytest.mark.parametrize("word", JOINING.split())
def test_words_that_make_a_hedge(word: str) -> None:
    assert scoring.answer_letter(f"The answer is A {word} B", set("AB")) is None
    assert scoring.answer_letter(f"The answer is a {word} b.", set("AB")) is None


@pytest.mark.parametrize("said", NEGATIONS)
def test_what_is_denied_is_not_named(said: str) -> None:
    assert scoring.answer_letter(said, set("ABCD")) is None
    assert scoring.answer_letter(f"{said}. It is D", set("ABCD")) == "D"


@pytest.mark.parametrize("word", LETTERS_WITH_WORDS.split())
def test_words_before_which_an_a_is_no_article(word: str) -> None:
    assert scoring.answer_letter(f"A {word} xx", set("AB")) == "A"
    assert scoring.answer_letter(f"A  {word}xx", set("AB")) is None


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("the answer is a because it is red", "A"),
        ("the answer is a since it is red", "A"),
        ("the answer is a as it is red", "A"),
        ("the answer is a and nothing else", "A"),
        ("the answer is a or so", "A"),
        ("the answer is a asset", None),
        ("the answer is a!", "A"),
        ("the answer is a, I think", "A"),
        ("the answer is a  / b", None),
        ("Option B: blue, near C", "B"),
        ("Choice B. Blue, near C", "B"),
        ("- (B) blue, near C", "B"),
        ("B: blue, near C", "B"),
        ("B. blue, near C) red", None),
        ("(B) blue (C) red", None),
        ("B. blue\n  C. red", None),
        ("It is blue, b. is it", None),
        ("see b.c", None),
        ("Data dog", None),
        ("banswer: A, B", None),
        ("BA dog", None),
        ("The answer? Is B", "B"),
    ],
)
def test_odd_ends(said: str, letter: str | None) -> None:
    assert scoring.answer_letter(said, set("ABCD")) == letter


@pytest.mark.parametrize("quote", ["\u2018b\u2019", "\u201cb\u201d", "`B`", "_b_"])
def test_typographic_quotes_are_quotes(quote: str) -> None:
    assert scoring.answer_letter(quote, set("ABCD")) == "B"
    assert scoring.answer_letter(f"The answer is {quote}.", set("ABCD")) == "B"
    assert scoring.answer_letter("It isn\u2019t A", set("ABCD")) is None
    assert scoring.answer_letter("A\u2013D", set("ABCD")) is None


def test_a_pronoun_is_an_option_only_where_it_is_offered() -> None:
    assert scoring.answer_letter("I think that it is B", set("ABCD")) == "B"
    assert scoring.answer_letter("The answer is I", set("ABCDEFGHI")) == "I"
    assert scoring.answer_letter("I or B", set("ABCDEFGHI")) is None


@pytest.mark.parametrize("response", ["C or A", "A/C", "A, or E", "Answer: b/w photo"])
def test_a_hedge_with_a_letter_that_was_not_offered_is_one(response: str) -> None:
    assert scoring.answer_letter(response, {"A", "B"}) is None


@pytest.mark.parametrize("piece", ["A, ", "A or ", "not the ", "the ", "A. ", "(A", "answer "])
def test_a_response_that_repeats_itself_is_read_in_no_time(piece: str) -> None:
    begun = time.perf_counter()
    scoring.answer_letter(piece * (3000 // len(piece)), set("ABCD"))
    assert time.perf_counter() - begun < 5  # on a busy machine; the worst takes 0.3 s


@pytest.mark.parametrize("response", ["C", "(C)", "Answer: C", "C. behind"])
def test_a_letter_that_was_not_offered_does_not_count(response: str) -> None:
    assert scoring.answer_letter(response, {"A", "B"}) is None


@given(st.text(max_size=40))
def test_letter_is_always_an_offered_one(response: str) -> None:
    assert scoring.answer_letter(response, {"A", "B"}) in {"A", "B", None}


@given(st.text("abcdefghijklmnopqrstuvwxyz ", min_size=2, max_size=40))
def test_lower_case_words_name_no_letter(response: str) -> None:
    if all(len(word) > 1 for word in response.split()):
        assert scoring.answer_letter(response.capitalize(), {"B", "C", "D"}) is None


@pytest.mark.parametrize(
    ("said", "letter"), [("-B", "B"), (".b", "B"), ("i.e.B", "B"), ("It is B", "B")]
)
def test_a_letter_of_the_only_option(said: str, letter: str) -> None:
    assert scoring.answer_letter(said, {"B"}) == letter


def test_the_options_of_a_question() -> None:
    assert scoring.offered("What? (A) red (b) blue (C) green\n(E) B") == {"A", "C", "E"}
    assert scoring.offered("What is it? A: red") == {"A", "B", "C", "D"}


def test_letters_are_counted_by_option() -> None:
    names = ["answered_a", "answered_b", "answered_c", "answered_d"]
    for letter, counts in (("B", [0, 1, 0, 0]), ("E", [0] * 4), (None, [0] * 4)):
        assert scoring.letter_counts(letter) == dict(zip(names, counts, strict=True))


def test_the_mean_of_no_score_is_no_number() -> None:
    assert math.isnan(scoring.mean_score([]))
    assert math.isnan(scoring.mean_score([{"other": 1.0}]))
    assert scoring.mean_score([{"score": 1.0}, {"score": 0.0}, {"score": 0.5}, {}]) == 0.5


def test_unparsed_answers_are_wrong_and_counted() -> None:
    doc = {"text": "What colour? (A) red (B) blue", "label": "B"}
    others = {"answered_c": 0.0, "answered_d": 0.0}
    assert vstar.process_results(doc, ["B"]) == others | {
        "accuracy": 1.0,
        "unparsed": 0.0,
        "answered_a": 0.0,
        "answered_b": 1.0,
    }
    assert vstar.process_results(doc, ["A"])["accuracy"] == 0
    wrong = vstar.process_results(doc, ["Blue"])
    assert (wrong["accuracy"], wrong["unparsed"], wrong["answered_b"]) == (0, 1, 0)


def test_each_category_has_its_own_accuracy() -> None:
    doc = {"text": "(A) left (B) right", "label": "A", "category": "relative_position"}
    graded = vstar.process_whole(doc, ["A"])
    assert graded["accuracy"] == graded["accuracy_relative_position"] == {"score": 1.0}
    assert graded["accuracy_direct_attributes"] == {}
    assert scoring.mean_score([{"score": 1.0}, {}, {"score": 0.0}]) == 0.5


def test_prompt_is_the_harness_s() -> None:
    from lmms_eval.tasks.vstar_bench import utils as harness

    kwargs = {"post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    doc = {"text": "What colour?\n(A) red\n(B) blue"}
    assert vstar.doc_to_text(doc, kwargs) == harness.vstar_doc_to_text(doc, kwargs)


# V*: the options

TRUE = vstar_true_rows().to_list()


def test_the_data_set_s_own_instruction_is_no_option() -> None:
    assert vstar.asked(TRUE[1]) == vstar.Asked(
        "What is the color of the dustpan?", ("purple", "red", "blue", "white"), 2, VSTAR_ENDING
    )
    bare = {**TRUE[2], "text": "Is it? (A) left (B) right"}
    assert vstar.asked(bare) == vstar.Asked("Is it?", ("left", "right"), 0, "")


@pytest.mark.parametrize(
    ("text", "label"),
    [("What is it?", "A"), ("What? (A) red (C) blue", "A"), ("What? (A) red (B) blue", "C")],
)
def test_texts_of_another_form_are_refused(text: str, label: str) -> None:
    doc = {"text": text, "label": label, "question_id": "7"}
    with pytest.raises(
        ValueError, match=r"V\* question 7 needs options \(A\), \(B\), \.\.\. and one"
    ):
        vstar.asked(doc)


def test_shuffled_options_keep_what_is_right() -> None:
    for doc in TRUE:
        before, after = vstar.asked(doc), vstar.asked(vstar.shuffled(doc))
        assert sorted(after.options) == sorted(before.options)
        assert after.options[after.right] == before.options[before.right]
        assert (after.question, after.ending) == (before.question, before.ending)
        assert vstar.shuffled_to_target(doc) == "ABCD"[after.right]


def test_the_order_depends_on_the_document_and_not_on_the_order_it_had() -> None:
    """Pinned: another order would be another benchmark under the same name."""
    assert [vstar.shuffled(doc)["label"] for doc in TRUE] == PINNED
    turned = {**TRUE[0], "text": "What is the material of the glove?\n(A) leather\n(B) kevlar\n"}
    turned |= {"text": turned["text"] + "(C) rubber\n(D) cotton" + VSTAR_ENDING, "label": "C"}
    assert vstar.shuffled(turned) == vstar.shuffled(TRUE[0])


def test_the_right_option_moves_to_every_place() -> None:
    texts = "What is it?\n(A) red\n(B) blue\n(C) green\n(D) white"
    docs = [{"text": texts, "label": "A", "question_id": str(i)} for i in range(400)]
    labels = [vstar.shuffled(doc)["label"] for doc in docs]
    assert all(70 < labels.count(letter) < 130 for letter in "ABCD")


def test_shuffled_prompt_is_the_harness_s_over_the_shuffled_text() -> None:
    kwargs = {"post_prompt": VSTAR_ENDING}
    prompt = vstar.shuffled_to_text(TRUE[2], kwargs)
    assert prompt == vstar.doc_to_text(vstar.shuffled(TRUE[2]), kwargs)
    assert prompt.startswith("Is the dog on the left or right side of the bicycle?\nA. ")


def test_options_as_sentences() -> None:
    assert vstar.statements(TRUE[0])[0] == "The material of the glove is rubber."
    assert vstar.statements(TRUE[2]) == [
        "The dog is on the right side of the bicycle.",
        "The dog is on the left side of the bicycle.",
    ]
    assert vstar.statement("How many birds?", "two") == "two"
    assert vstar.question_alone(TRUE[0]) == "What is the material of the glove?"


def test_the_smallest_loss_is_the_answer() -> None:
    pairs = [(2.0, False), (0.5, True), (0.7, False), (3.0, False)]
    assert vstar.process_likelihood(TRUE[0], pairs)["accuracy"] == {"score": 0.0}
    assert vstar.right_index(TRUE[1]) == 2
    assert vstar.process_likelihood(TRUE[1], [pairs[0], *pairs[2:0:-1], pairs[3]]) == {
        "accuracy": {"score": 1.0},
        "accuracy_direct_attributes": {"score": 1.0},
        "accuracy_relative_position": {},
    }


def test_shuffled_options_are_graded_by_their_new_letter() -> None:
    for doc, letter in zip(TRUE, PINNED, strict=True):
        assert vstar.process_shuffled(doc, [letter])["accuracy"] == {"score": 1.0}
        assert vstar.process_shuffled(doc, ["D"])["accuracy"] == {"score": 0.0}


def test_a_whole_task_has_every_measure_of_its_parts() -> None:
    doc = {"text": "(A) left (B) right", "label": "A", "category": "relative_position"}
    assert vstar.process_whole(doc, ["blue"]) == {
        "accuracy": {"score": 0.0},
        "accuracy_direct_attributes": {},
        "accuracy_relative_position": {"score": 0.0},
        "unparsed": {"score": 1.0},
        **{f"answered_{letter}": {"score": 0.0} for letter in "abcd"},
    }


def test_three_options_are_as_good_as_two_or_four() -> None:
    doc = {"text": "What? (A) red (B) blue (C) green", "label": " c ", "question_id": "7"}
    assert vstar.asked(doc) == vstar.Asked("What?", ("red", "blue", "green"), 2, "")


def test_sentences_about_sides_by_hand() -> None:
    question = "Is a dog on the left or right side of the bicycle?"
    assert vstar.statement(question, "left") == "A dog is on the left side of the bicycle."
    assert vstar.statement(question, "behind") == "behind"
    assert vstar.statement("How many birds?", "left") == "left"


def test_the_harness_s_overall_score_comes_first() -> None:
    graded = vstar.process_as_harness(TRUE[0], ["A"])
    assert next(iter(graded)) == "vstar_overall_acc"
    assert graded.keys() == vstar.vstar_process_results(TRUE[0], ["A"]).keys()
    assert len(graded) == 2
    assert graded["vstar_overall_acc"]["score"] == 1.0


def numbered(rows: int, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"n": list(range(rows)), **columns})


def test_documents_of_a_category_by_hand() -> None:
    categories = ["direct_attributes", "relative_position", "direct_attributes"]
    documents = numbered(3, category=categories)
    assert vstar.direct_attributes(documents)["n"][:] == [0, 2]
    assert vstar.relative_position(documents)["n"][:] == [1]


@pytest.mark.parametrize(
    ("folder", "function", "rows", "first"),
    [
        ("ci", "textvqa", 5000, [17, 28, 68]),
        ("ci", "docvqa", 5349, [19, 37, 63]),
        ("ci", "infovqa", 2801, [11, 14, 39]),
        ("ci", "chartqa", 2500, [2, 12, 25]),
        ("ci", "ocrbench", 1000, [0, 6, 13]),
        ("ci", "pope", 9000, [9, 53, 113]),
        ("vstar", "ci", 191, [0, 1, 2]),
        ("hrbench", "ci_4k", 800, [0, 6, 11]),
        ("hrbench", "ci_8k", 800, [3, 4, 8]),
    ],
)
def test_each_subset_has_its_own_documents(
    folder: str, function: str, rows: int, first: list[int]
) -> None:
    images = {"image": ["AAAA"] * rows} if folder == "hrbench" else {}
    chosen = getattr(task_utils(folder), function)(numbered(rows, **images))
    assert chosen["n"][:3] == first
    if images:
        assert chosen.features["image"] == ImageColumn(decode=False)


# HR-Bench


def test_hrbench_images_are_decoded_once_and_kept_as_files() -> None:
    """From base64 text, and from a copy whose images are files already."""
    rows = hrbench_rows()
    expected = base64.b64decode(rows[0]["image"])
    made = hrbench.with_images(rows)
    assert made.features["image"] == ImageColumn(decode=False)
    assert [doc["image"] for doc in made] == [{"bytes": expected, "path": None}] * len(rows)
    assert made.remove_columns("image")[:] == rows.remove_columns("image")[:]
    decoded = made.cast_column("image", ImageColumn())
    again = hrbench.with_images(decoded)
    assert again.features["image"] == ImageColumn(decode=False)
    assert again[3]["image"]["bytes"] == expected
    (shown,) = hrbench.doc_to_visual(made[0])
    assert (shown.mode, shown.size) == ("RGB", (512, 600))


def test_hrbench_images_are_shown_in_colour() -> None:
    file = io.BytesIO()
    Image.new("L", (3, 2), 7).save(file, "PNG")
    (shown,) = hrbench.doc_to_visual({"image": {"bytes": file.getvalue()}})
    assert (shown.mode, shown.size, shown.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))


def test_hrbench_is_graded_by_its_letter() -> None:
    doc = {"answer": "B", "category": "cross", "cycle_category": "2", "index": 5}
    doc |= {"A": "red", "B": "blue", "C": None, "D": None}
    item = {"score": 1.0, "cycle_category": "2"}
    assert hrbench.process_results(doc, ["B. blue"]) == {
        "average": item,
        "single": {},
        "cross": item,
        "unparsed": {"score": 0.0},
    }
    wrong = hrbench.process_results(doc, ["C"])  # not offered
    assert (wrong["average"]["score"], wrong["unparsed"]["score"]) == (0, 1)
    assert hrbench.process_results(doc, ["blue"])["unparsed"]["score"] == 1


def test_hrbench_means_are_the_harness_s() -> None:
    from lmms_eval.tasks.hrbench.utils import hrbench_aggregate_results

    scores = [("0", 1.0), ("0", 0.0), ("0", 1.0), ("1", 1.0), ("2", 0.0)]
    ours = [{"score": s, "cycle_category": c} for c, s in scores]
    theirs = [{"gpt_score": s, "cycle_category": c} for c, s in scores]
    assert hrbench.mean_over_cycles([*ours, {}]) == hrbench_aggregate_results(theirs, None)
    assert hrbench.mean_over_cycles([{}]) != hrbench.mean_over_cycles([{}])  # NaN


# tiny_vstar


@pytest.mark.parametrize(
    ("response", "score"),
    [("red level", 1), ("level", 1), ("Red  level ", 1), ("blue level", 0), ("red", 0), ("", 0)],
)
def test_tiny_vstar_score(response: str, score: int) -> None:
    doc = {"answer": "level", "colour": "red", "category": "fine", "image_id": 3}
    result = tiny_vstar.process_results(doc, [response])
    assert result["accuracy"] == result["accuracy_fine"] == {"image_id": 3, "score": score}
    assert result["accuracy_coarse"] == {"image_id": 3}


@pytest.mark.parametrize(
    ("response", "score"), [("red 7", 1), ("7", 1), ("sign 7", 0), ("red 1", 0)]
)
def test_tiny_trio_scores_by_kind_and_category(response: str, score: int) -> None:
    doc = {"answer": "7", "name": "red", "category": "fine", "group": "textvqa", "image_id": 3}
    result = tiny_trio.process_results(doc, [response])
    scored = {name for name, item in result.items() if item == {"image_id": 3, "score": score}}
    assert scored == {"accuracy", "accuracy_fine", "accuracy_textvqa"}
    assert all(item == {"image_id": 3} for name, item in result.items() if name not in scored)
    page = Path(__file__).parents[2] / "tasks" / "tiny_trio" / "tiny_trio.yaml"
    metrics = load_yaml_config(str(page), mode="simple")
    assert {metric["metric"] for metric in metrics["metric_list"]} == set(result)


@pytest.mark.parametrize("task", [tiny_vstar, tiny_trio])
def test_embedded_tasks_ask_their_question_about_their_picture_in_colour(task: Any) -> None:
    doc = {"image": Image.new("L", (3, 2), 7), "question": "what ?"}
    (shown,) = task.doc_to_visual(doc)
    assert (shown.mode, shown.size, shown.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))
    assert task.doc_to_text(doc) == "what ?"


def test_tiny_vstar_means_leave_out_the_other_group() -> None:
    items = [{"image_id": 1, "score": 1.0}, {"image_id": 1}, {"image_id": 2, "score": 0.0}]
    assert tiny_vstar.mean_score(items) == 0.5


# Local data


def test_textvqa_and_docvqa_from_local_parquet(data: Path) -> None:
    write(textvqa_rows(3), data / "textvqa_val")
    write(docvqa_rows(2), data / "docvqa_val", "validation-00000-of-00001.parquet")
    tasks = manager().load_task_or_group(["textvqa_val", "docvqa_val"])
    for name, n in (("textvqa_val", 3), ("docvqa_val", 2)):
        assert len(tasks[name].eval_docs) == n
        (image,) = tasks[name].doc_to_visual(tasks[name].eval_docs[1])
        assert image.getpixel((0, 0)) == (1, 0, 0)
    assert tasks["textvqa_val"].config.generation_kwargs == {"until": ["ASSISTANT:"]}
    assert tasks["docvqa_val"].config.metric_list[0]["metric"] == "anls"


def test_groups_work_with_local_parts(data: Path) -> None:
    write(textvqa_rows(2), data / "textvqa_val")
    write(textvqa_rows(4), data / "textvqa_test")
    ((group, parts),) = manager().load_task_or_group(["textvqa"]).items()
    assert group.group_name == "textvqa"
    assert {n: len(t.eval_docs) for n, t in parts.items()} == {"textvqa_val": 2, "textvqa_test": 4}


def test_a_group_s_folder_serves_its_parts_by_split(data: Path) -> None:
    write(docvqa_rows(2), data / "docvqa", "validation-00000-of-00001.parquet")
    write(docvqa_rows(3), data / "docvqa", "test-00000-of-00001.parquet")
    ((_, parts),) = manager().load_task_or_group(["docvqa"]).items()
    assert {n: len(t.eval_docs) for n, t in parts.items()} == {"docvqa_val": 2, "docvqa_test": 3}


def test_vstar_is_split_by_category(data: Path) -> None:
    write(vstar_rows(5, 3), data / "vstar")
    ((group, parts),) = manager().load_task_or_group(["vstar"]).items()
    assert group.group_name == "vstar"
    sizes = {name: len(task.eval_docs) for name, task in parts.items()}
    assert sizes == {"vstar_direct_attributes": 5, "vstar_relative_position": 3}
    task = parts["vstar_relative_position"]
    assert task.doc_to_text(task.eval_docs[0]) == (
        "What is it?\nA. left\nB. right\n"
        "Answer with the option's letter from the given choices directly."
    )


def source_of(index: Any, task: str) -> str | None:
    """The local file behind a task of an index; None for the hub."""
    config = load_yaml_config(index[task]["yaml_path"], mode="simple")
    if config["dataset_path"] != "parquet":  # files of the hub's
        return None
    files = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    return next((Path(f).parent.name for names in files.values() for f in names), None)


def test_tasks_of_a_family_read_the_same_folder(data: Path) -> None:
    write(textvqa_rows(2), data / "textvqa_val", "validation-00000-of-00001.parquet")
    write(vstar_true_rows(), data / "vstar")
    write(hrbench_rows(), data / "hrbench4k", "hr_bench_4k.parquet")
    index = manager("hrbench").task_index
    for task in ("textvqa_val", "textvqa_val_ocr", "textvqa_ci"):
        assert source_of(index, task) == "textvqa_val"
    for task in ("harness", "shuffled", "likelihood", "ci", "direct_attributes", "bench"):
        assert source_of(index, f"vstar_{task}") == "vstar"
    for task in ("hrbench4k", "hrbench4k_offline", "hrbench4k_ci"):
        assert source_of(index, task) == "hrbench4k"
    for task in ("textvqa_test", "hrbench8k_offline", "docvqa_ci"):
        assert source_of(index, task) is None


def test_a_subset_s_folder_serves_the_subset_alone(data: Path) -> None:
    write(textvqa_rows(3), data / "textvqa_ci", "validation-00000-of-00001.parquet")
    write(vstar_rows(2, 0), data / "vstar_direct_attributes")
    index = manager().task_index
    assert source_of(index, "textvqa_ci") == "textvqa_ci"
    assert source_of(index, "textvqa_val") is None
    assert source_of(index, "vstar_shuffled") is None


def test_its_own_folder_goes_before_a_lent_one(data: Path) -> None:
    write(textvqa_rows(3), data / "textvqa_ci")
    write(textvqa_rows(5), data / "textvqa_val")
    index = manager().task_index
    assert source_of(index, "textvqa_ci") == "textvqa_ci"
    assert source_of(index, "textvqa_val_ocr") == "textvqa_val"


def test_hrbench_s_text_becomes_image_files(data: Path) -> None:
    write(hrbench_rows(), data / "hrbench4k")
    (task,) = manager("hrbench").load_task_or_group(["hrbench4k_offline"]).values()
    from lmms_eval.tasks.hrbench.utils import hrbench_doc_to_visual

    (theirs,) = hrbench_doc_to_visual(hrbench_rows()[0])
    (ours,) = task.doc_to_visual(task.eval_docs[0])
    assert ours.tobytes() == theirs.tobytes()
    assert "image" not in task.eval_docs_no_media.column_names
    assert task.doc_to_text(task.eval_docs_no_media[1]).endswith(
        "A. green\nB. blue\nC. white\nD. red\nAnswer the option letter directly."
    )


def test_a_missing_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPN_DATA", "/no/such/folder")
    with pytest.raises(ValueError, match=r"SDRPN_DATA=/no/such/folder is not a folder"):
        manager()


def test_a_folder_without_its_split_is_named(data: Path) -> None:
    write(textvqa_rows(1), data / "textvqa_val", "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"textvqa_val has no parquet file of the split 'valida"):
        manager()


def test_images_without_the_schema_are_refused(data: Path) -> None:
    import pyarrow.parquet as pq

    write(textvqa_rows(1), data / "textvqa_val")
    path = data / "textvqa_val" / "data.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(ValueError, match=r"data.parquet holds image bytes \(image\) without"):
        manager()


def test_a_task_without_a_folder_stays_on_the_hub(data: Path) -> None:
    write(textvqa_rows(1), data / "textvqa_val")
    index = manager().task_index
    assert "sdrpn_tasks" in index["textvqa_val"]["yaml_path"]
    assert "sdrpn_tasks" not in index["docvqa_val"]["yaml_path"]


# Names


@pytest.mark.parametrize(
    ("task", "threshold"),
    [
        ("textvqa_val", 0.15),
        ("textvqa_val_lite", 0.15),
        ("textvqa_ci", 0.15),
        ("docvqa_val", 0.1),
        ("vstar_direct_attributes", 0.1),
        ("vstar_bench", 0.1),
        ("hrbench4k", 0.1),
        ("hrbench8k", 0.1),
        ("ocrbench", 0.05),
        ("textvqa_val_ocr", 0.15),
        ("docvqa_ci", 0.1),
        ("infovqa_ci", 0.15),
        ("chartqa_ci", 0.15),
        ("ocrbench_ci", 0.05),
        ("pope_ci", 0.15),
        ("vstar_ci", 0.1),
        ("vstar_harness", 0.1),
        ("vstar_shuffled", 0.1),
        ("vstar_likelihood", 0.1),
        ("hrbench4k_offline", 0.1),
        ("hrbench8k_ci", 0.1),
        ("tiny_vstar", "peak"),
        ("multidocvqa_val", 0.15),
        ("something_new", 0.15),
    ],
)
def test_threshold_by_family(task: str, threshold: float) -> None:
    assert tasks_info.threshold_of(task) == threshold


def test_which_parts_have_a_score() -> None:
    index = manager().task_index
    scored = tasks_info.scored_parts(["textvqa", "docvqa", "vstar", "no_such_task"], index)
    assert scored == {
        "textvqa_val": True,
        "textvqa_test": False,
        "docvqa_val": True,
        "docvqa_test": False,
        "vstar_direct_attributes": True,
        "vstar_relative_position": True,
    }
    line = tasks_info.describe(scored)
    assert "submission only: textvqa_test, docvqa_test:" in line
    assert "Protocols: textvqa_val: no OCR tokens in the prompt; vstar_direct" in line


def test_task_names_on_the_command_line() -> None:
    assert tasks_info.requested(["lmms-eval", "--tasks", "a,b"]) == ["a", "b"]
    assert tasks_info.requested(["lmms-eval", "--tasks=a"]) == ["a"]
    assert tasks_info.requested(["lmms-eval"]) == []


@pytest.mark.parametrize("task", [tiny_vstar, tiny_trio])
def test_embedded_tasks_read_the_shipped_file(task: Any) -> None:
    name = Path(task.PARQUET).stem
    assert task.PARQUET.endswith(f"sdrpn_eval/demo/data/{name}.parquet")
    assert name in manager().all_subtasks
    assert "sdrpn_eval" in sys.modules
