"""The second edition's scenes, labels and turns say what the pictures show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from sdrpn import ZoomModel
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from tools.tiny_trio import benchmark, build, distil, language, model, patches, score, workers
from tools.tiny_trio import scenes as sc
from tools.tiny_trio.drawing import GROUPS, Canvas

SEEDS = range(6)


def scenes(kind: str, fine_share: float = 0.5) -> list[sc.Scene]:
    return [sc.MAKERS[kind](np.random.default_rng(seed), fine_share) for seed in SEEDS]


@pytest.mark.parametrize("kind", sc.KINDS)
def test_a_scene_depends_on_its_seed_alone(kind: str) -> None:
    for one, again in zip(scenes(kind), scenes(kind), strict=True):
        assert (one.image == again.image).all()
        assert one.items == again.items
    pictures = {scene.image.tobytes() for scene in scenes(kind)}
    assert len(pictures) == len(SEEDS)


@pytest.mark.parametrize("kind", sc.KINDS)
def test_every_question_of_a_scene_has_one_answer(kind: str) -> None:
    for scene in scenes(kind):
        questions = [item.question for item in scene.items]
        assert len(set(questions)) == len(questions) >= 3
        for item in scene.items:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 <= item.spot[0] < x1 <= sc.SIDE
            assert 0 <= y0 <= item.spot[1] < y1 <= sc.SIDE


def test_neighbours_are_where_the_question_says() -> None:
    for scene in scenes("vstar_relations"):
        direct = {item.question: item for item in scene.items if not item.relation}
        asked = [item for item in scene.items if item.relation]
        assert len(asked) == 2
        for item in asked:
            words = item.question.split()
            anchor = direct[f"what pattern is on the {' '.join(words[-3:])}"]
            shift = item.spot[0] - anchor.spot[0]
            assert (shift < 0) == ("left" in words)
            nearest = min(
                (other for other in direct.values() if other != anchor),
                key=lambda other: np.hypot(*np.subtract(other.spot, anchor.spot)),
            )
            assert (nearest.box, nearest.answer) == (item.box, item.answer)


def test_patches_are_named_by_what_covers_them() -> None:
    canvas = Canvas(np.full((sc.SIDE, sc.SIDE, 3), 128, np.uint8))
    rng = np.random.default_rng(0)
    canvas.shape(rng, "square", "red", "level", (105.0, 63.0), 60.0, 12.0)
    labels = dict(zip(GROUPS, patches.patch_labels(canvas, sc.WHOLE), strict=True))
    by_cell = {name: labels[name].reshape(sc.GRID, sc.GRID) for name in GROUPS}
    # A square of 103 px around the middle of cell (column 2, row 1), whose side is 42 px.
    assert by_cell["colour"][1, 2] == GROUPS["colour"].index("red")
    assert by_cell["shape"][1, 2] == GROUPS["shape"].index("square")
    assert by_cell["pattern"][1, 2] == GROUPS["pattern"].index("level")
    assert by_cell["colour"][9, 9] == len(GROUPS["colour"])
    assert by_cell["pattern"][9, 9] == patches.IGNORE
    assert set(by_cell["colour"][:3, 1:4].ravel()) == {0}
    assert set(by_cell["field"].ravel()) == {len(GROUPS["field"])}


def test_no_view_is_trained_to_name_what_it_cannot_show() -> None:
    glyphs = list(GROUPS).index("glyph")
    for fine_share, whole in ((1.0, False), (0.0, True)):
        for scene in scenes("textvqa", fine_share):
            named = patches.patch_labels(scene.canvas, sc.WHOLE)[glyphs]
            assert bool(((named >= 0) & (named < 10)).any()) == whole
            for item in scene.items:
                close = patches.patch_labels(scene.canvas, sc.oracle_box(item.box))[glyphs]
                assert GROUPS["glyph"].index(item.answer) in close or not item.fine


def test_the_last_round_also_asks_for_small_digits() -> None:
    """A zoom of 8 cells shows a digit of 12 px at 8 px: a fifth of a patch."""
    canvas = Canvas(np.full((sc.SIDE, sc.SIDE, 3), 240, np.uint8))
    canvas.glyph("7", (157.5, 157.5), 12.0, "DejaVuSans", (0, 0, 0))  # mid-patch
    glyphs, zoom = list(GROUPS).index("glyph"), PixelBox(0, 0, 336, 336)
    for small in (False, True):
        named = patches.patch_labels(canvas, zoom, small=small)[glyphs]
        assert (GROUPS["glyph"].index("7") in named) == small
    whole = patches.patch_labels(canvas, sc.WHOLE, small=True)[glyphs]
    assert ((whole == len(GROUPS["glyph"])) | (whole == patches.IGNORE)).all()


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("kind", sc.KINDS)
def test_zooms_hold_what_answers(kind: str, loose: bool) -> None:
    rng = np.random.default_rng(1)
    for scene in scenes(kind):
        for item in scene.items:
            box = sc.zoom_box(rng, item, loose=loose)
            assert box[0] <= item.spot[0] < box[2]
            assert box[1] <= item.spot[1] < box[3]
            assert all(edge % sc.CELL == 0 for edge in box)
            x0, y0, x1, y1 = sc.oracle_box(item.box)
            assert 0 <= x0 <= item.box[0] < item.box[2] <= x1 <= sc.SIDE
            assert 0 <= y0 <= item.box[1] < item.box[3] <= y1 <= sc.SIDE
            assert min(x1 - x0, y1 - y0) >= 3 * sc.CELL
    assert sc.oracle_box((0, 300, 20, 330)) == PixelBox(0, 252, 126, 378)


def test_turns_teach_the_response_and_its_end() -> None:
    processor = model.build_processor()
    turns, items = language.Turns(processor), scenes("vstar")[0].items[:2]
    ids, targets = turns.of([items])
    for row, told, item in zip(ids[0], targets[0], items, strict=True):
        words = processor.tokenizer.decode(told[told >= 0].tolist()).split()
        assert words == [*item.response.split(), "</s>"]
        assert processor.tokenizer.unk_token_id not in row.tolist()
        start = int((told >= 0).nonzero()[0])
        # What is predicted at a place stands at the next one.
        assert row[start + 1 : start + 3].tolist() == told[start : start + 2].tolist()


def test_packed_questions_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "BFLOAT16", False)
    torch.manual_seed(0)
    processor = model.build_processor()
    llava, turns = model.build_model(processor.tokenizer).eval(), language.Turns(processor)
    items = scenes("textvqa")[0].items[:3]
    features = np.random.default_rng(0).normal(size=(2, 256, model.HIDDEN)).astype(np.float16)
    keep = torch.rand(1, 256) < 0.5
    sample = language.Sample(features, items, (2,))
    batch = language.packed([(sample, 0, list(items[:2]), [items[2]])], turns, keep)
    with torch.no_grad():
        found = language.batch_logits(llava, turns, batch)[0]
        tokens = llava.model.multi_modal_projector(torch.from_numpy(features).float())
        embed = llava.get_input_embeddings()
        for j, item in enumerate(items):
            after, response = turns.ids(item)
            crop = tokens[1][keep[0]] if j == 2 else tokens[1][:0]
            text = embed(torch.tensor(after + response[:-1]))
            parts = [embed(torch.tensor(turns.prefix)), tokens[0], crop, text]
            states = llava.model.language_model(inputs_embeds=torch.cat(parts)[None])
            alone = llava.lm_head(states.last_hidden_state[0, -len(text) :])
            torch.testing.assert_close(found[j, : len(text)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", sc.KINDS)
def test_the_tokenizer_knows_every_word(kind: str) -> None:
    tokenizer = model.build_tokenizer()
    for scene in scenes(kind):
        for item in scene.items:
            for text in (item.question, item.response):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_heads_of_the_tower_start_at_their_neighbours() -> None:
    torch.manual_seed(0)
    processor = model.build_processor()
    tower = model.build_model(processor.tokenizer).model.vision_tower.eval()
    tower.set_attn_implementation("eager")
    views = torch.zeros(1, 3, sc.VIEW, sc.VIEW)
    with torch.no_grad():
        looks = tower(views, output_attentions=True).attentions[0][0, :, 1:, 1:]
    middle = 7 * sc.GRID + 7
    found = [divmod(int(head[middle].argmax()), sc.GRID) for head in looks]
    assert found == [(7, 6), (7, 8), (6, 7), (8, 7)]


def test_benchmark_rows_and_their_groups() -> None:
    rows = benchmark.rows_of([5], scenes=2)
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert len({row["image_id"] for row in rows}) == 6
    groups = score.groups_of(rows)
    assert groups["all"] == [*range(len(rows))]
    assert len(groups["fine"]) + len(groups["coarse"]) == len(rows)
    parts = [len(groups[name]) for name in sc.KINDS]
    assert sum(parts) == len(rows)
    tuning = benchmark.rows_of([5], scenes=2, stream=benchmark.TUNING)
    assert not {r["image"].tobytes() for r in rows} & {r["image"].tobytes() for r in tuning}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("red 7", True),
        ("7", True),
        ("sign red 1", False),
        ("sign blue 7", False),
        ("sign red 7", False),
        ("", False),
    ],
)
def test_answers_match_exactly(text: str, right: bool) -> None:
    assert score.is_right(text, "red", "7") == right


def test_zoom_settings_stay_as_published(tmp_path) -> None:
    lines = distil.commands(
        tmp_path, tmp_path, tmp_path, branch_layer=3, steps=1, seed=0, relabel=""
    )
    assert "--zoom" not in lines["train"]
    assert lines["train"][lines["train"].index("--branch-layer") + 1] == "3"


def _average(out: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), float(workers.rank()))
    workers.average_gradients([parameter])
    torch.save(parameter.grad, out / f"{workers.rank()}-of-{workers.world()}.pt")


@pytest.mark.slow
def test_two_processes_share_their_gradients(tmp_path) -> None:
    workers.in_parallel(_average, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}-of-2.pt", weights_only=True)
        assert found.tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_both_training_stages_run_and_leave_a_model_that_answers(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of each, in this process: everything fits together, nothing is learned yet."""
    monkeypatch.setattr(build, "in_parallel", lambda job, *arguments: job(*arguments))
    sizes = build.Sizes(
        views=220,
        vision_steps=(2, 2, 2),
        vision_batch=4,
        scenes=(6, 6),
        held_out=3,
        language_steps=(2, 2),
        language_batch=2,
    )
    build.train(tmp_path, 0, sizes)
    before, tower, last = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("stage0-2", "stage0-3", "model")
    )
    for name, values in tower.items():
        if "vision_tower" in name:
            torch.testing.assert_close(last[name].float(), values, atol=1e-3, rtol=1e-3)
        elif "projector" in name:
            assert torch.equal(values, before[name])
    changed = [name for name in tower if not torch.equal(tower[name], before[name])]
    assert changed
    log = json.loads((tmp_path / "model" / build.LOG).read_text())["log"]
    assert log[-1]["step"] == 2
    assert np.isfinite(log[-1]["loss"])
    zoom = ZoomModel(Llava15.load(str(tmp_path / "model"), dtype="float32"), proposer="none")
    item = scenes("docvqa")[0].items[0]
    image = Image.fromarray(scenes("docvqa")[0].image)
    answer = zoom.ask(image, item.question, box=sc.oracle_box(item.box), max_new_tokens=3)
    assert answer.regions == (sc.oracle_box(item.box),)
    assert answer.crop_tokens == 256
