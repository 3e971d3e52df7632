"""The gate, the resumed question and the thinned upper layers, for every model family.

References are full forwards without a cache: tests/helpers/families.py, and for thinned layers the
same under hooks that drop the tokens in front of layer B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from sdrpn.boxes import PixelBox
from sdrpn.config import ZoomConfig
from sdrpn.engine import Answer, Question, ZoomModel
from sdrpn.rpn.checkpoint import RPN
from tests.helpers.families import NEW_TOKENS, Family
from tests.sdrpn.test_family_invariants import NOTHING, TOLERANCE, ask, said, same

KEPT = 5


def engine(family: Family, **zoom: Any) -> ZoomModel:
    settings = replace(family.zoom, **zoom)
    return ZoomModel(family.backbone, family.rpn, zoom=settings, prefix_cache=0)


# --- thinned upper layers ----------------------------------------------------------------------


@contextmanager
def dropped(family: Family, columns: Sequence[int]) -> Iterator[None]:
    """Every forward drops these tokens in front of layer B; the others keep their positions."""

    def keep(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        left = [i for i in range(tensor.shape[axis]) if i not in set(columns)]
        return tensor.index_select(axis, torch.tensor(left))

    def enter(first: bool) -> Any:
        def hook(_: Any, args: Any, given: dict[str, Any]) -> Any:
            hidden = keep(args[0], 1) if first else args[0]
            cos, sin = given["position_embeddings"]
            mask = given["attention_mask"]
            mask = mask if mask is None else keep(keep(mask, 2), 3)
            given = given | {"position_embeddings": (keep(cos, 1), keep(sin, 1))}
            return (hidden, *args[1:]), given | {"attention_mask": mask}

        return hook

    depth = family.rpn.branch_layer
    hooks = [
        layer.register_forward_pre_hook(enter(index == depth), with_kwargs=True)
        for index, layer in family.backbone.layers[depth:]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def thinned_reference(
    family: Family, answer: Answer, question: Question, zoom: ZoomConfig
) -> tuple[list[int], torch.Tensor]:
    logits = family.full_map(family.rpn, question.images[0], question.text).ravel()
    kept = set(np.argsort(-logits)[: zoom.keep_tokens].tolist())
    start = len(family.backbone.prompt_ids(question.text).before)
    with dropped(family, [start + cell for cell in range(len(logits)) if cell not in kept]):
        return family.in_full(answer, question, zoom)


@pytest.mark.parametrize("size", [1, 7])
def test_thinned_layers_are_a_forward_without_the_tokens(
    family: Family, questions: list[Question], size: int
) -> None:
    zoom = engine(family, keep_tokens=KEPT)
    whole = engine(family)
    changed = zoomed = 0
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        for question, (answer, logits), (other, before) in zip(
            batch, ask(zoom, batch), ask(whole, batch), strict=True
        ):
            assert answer.regions == other.regions
            if not answer.regions:
                # No region: the upper layers see everything, as the stock model's.
                ids, reference = family.stock(question.images[0], question.text)
            else:
                zoomed += 1
                ids, reference = thinned_reference(family, answer, question, zoom.zoom)
                changed += bool((logits[0] - before[0]).abs().max() > 10 * TOLERANCE)
            assert answer.text == said(family, ids)
            assert (logits - reference).abs().max() < TOLERANCE
    assert zoomed >= 5
    assert changed == zoomed


def test_thinned_beams_and_warm_caches_do_not_show(
    family: Family, questions: list[Question]
) -> None:
    settings = replace(family.zoom, keep_tokens=KEPT)
    alone = [ask(engine(family, keep_tokens=KEPT), [q])[0] for q in questions]
    warm = ZoomModel(family.backbone, family.rpn, zoom=settings, prefix_cache=2**30)
    for _ in ("cold", "warm"):
        same(ask(warm, questions), alone)
    beams = {"num_beams": 3, "max_new_tokens": NEW_TOKENS}
    together = [answer.text for answer in warm.ask_batch(questions, beams)]
    assert together == [warm.ask_batch([q], beams)[0].text for q in questions]
    # At a temperature near zero sampling has one outcome.
    sampling = {"do_sample": True, "temperature": 1e-6, "max_new_tokens": NEW_TOKENS}
    sampled = [answer.text for answer in warm.ask_batch(questions, sampling)]
    assert sampled == [answer.text for answer, _ in alone]


def test_settings_of_neighbours_do_not_show(family: Family, questions: list[Question]) -> None:
    """Thinned, whole, gated and boxed questions about one image in one batch."""
    kinds = [
        family.zoom,
        replace(family.zoom, keep_tokens=KEPT),
        replace(family.zoom, keep_tokens=KEPT + 2),
        NOTHING,
        replace(NOTHING, keep_tokens=KEPT),
    ]
    box = PixelBox(3, 5, 40, 50)
    mixed = [replace(q, zoom=kind) for q in questions[::3] for kind in kinds]
    mixed += [replace(q, box=box, zoom=kinds[1]) for q in questions[:2]]
    zoom = ZoomModel(family.backbone, family.rpn, prefix_cache=2**30)
    alone = [ask(ZoomModel(family.backbone, family.rpn, prefix_cache=0), [q])[0] for q in mixed]
    same(ask(zoom, mixed), alone)
    same(ask(zoom, mixed[::-1]), alone[::-1])


def test_as_many_tokens_as_there_are_is_no_thinning(
    family: Family, questions: list[Question]
) -> None:
    expected = ask(engine(family), questions[:8])
    same(ask(engine(family, keep_tokens=10_000), questions[:8]), expected)


def test_thinned_losses_are_those_of_the_forward(family: Family, questions: list[Question]) -> None:
    """The loss of one token, from the logits of the reference's first step."""
    zoom = engine(family, keep_tokens=KEPT)
    zoomed = [(q, a) for q, (a, _) in zip(questions, ask(zoom, questions), strict=True)]
    zoomed = [(q, a) for q, a in zoomed if a.regions]
    assert len(zoomed) > 3
    ids = {word: zoom._continuation_ids(questions[0], word) for word in ["a", "b", "red", "level"]}
    word, (token,) = next((word, own) for word, own in ids.items() if len(own) == 1)
    scored = zoom.loss_batch([q for q, _ in zoomed], [word] * len(zoomed))
    for (question, answer), (loss, greedy, _) in zip(zoomed, scored, strict=True):
        _, logits = thinned_reference(family, answer, question, zoom.zoom)
        expected = -float(log_softmax(logits[0].float(), -1)[token])
        assert loss == pytest.approx(expected, abs=TOLERANCE)
        assert greedy == (int(logits[0].argmax()) == token)


def test_a_prefix_holds_the_lower_layers_until_more_are_needed(
    family: Family, questions: list[Question]
) -> None:
    backbone, rpn = family.backbone, family.rpn
    settings = replace(family.zoom, keep_tokens=KEPT)
    zoom = ZoomModel(backbone, rpn, zoom=settings, prefix_cache=2**30)
    zoomed = [q for q, (a, _) in zip(questions, ask(zoom, questions), strict=True) if a.regions]
    zoom.prefixes.clear()
    question = zoomed[0]
    ask(zoom, [question])
    key = zoom._key(question.image_keys[0])
    prefix = zoom.prefixes.get(key)
    assert prefix is not None
    assert (len(prefix.kv), prefix.hidden is None) == (rpn.branch_layer, False)
    lower = zoom.prefixes.nbytes
    ask(zoom, [replace(question, zoom=NOTHING)])
    prefix = zoom.prefixes.get(key)
    assert prefix is not None
    assert len(prefix.kv) == backbone.num_layers
    assert zoom.prefixes.nbytes == prefix.nbytes > lower


# --- the question is run once ------------------------------------------------------------------


def test_without_a_region_the_question_goes_on_from_the_branch(
    family: Family, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower layers run over the question's tokens once, and generate() once more over the last."""
    zoom = engine(family)
    (question, layer), tokens = (questions[0], family.backbone.layers[0][1]), []
    prefixes = zoom.prefill(question.images)
    monkeypatch.setattr(zoom, "_prefill", lambda *_: prefixes)
    hook = layer.register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    ask(zoom, [replace(question, zoom=NOTHING)], max_new_tokens=1)
    hook.remove()
    assert tokens == [len(family.backbone.prompt_ids(question.text).after), 1]


# --- the gate ----------------------------------------------------------------------------------


def confidences(family: Family, questions: Sequence[Question]) -> list[float]:
    """Smallest probability of a token of the stock answer, by transformers alone."""
    found, end = [], family.backbone.eos_token_id
    for question in questions:
        ids, logits = family.stock(question.images[0], question.text)
        ids = ids[: ids.index(end)] if end in ids else ids
        own = logits.softmax(-1)[range(len(ids)), ids]
        found.append(float(own.min()) if ids else 0.0)
    return found


@pytest.mark.parametrize("size", [1, 8])
def test_sure_answers_stand_and_others_are_looked_at(
    family: Family, questions: list[Question], size: int
) -> None:
    expected = confidences(family, questions)
    gate = float(np.median(expected)) + 1e-5
    gated, whole = engine(family, gate=gate), engine(family)
    stood = 0
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        settings = {"max_new_tokens": NEW_TOKENS}
        answers, zoomed = gated.ask_batch(batch, settings), whole.ask_batch(batch, settings)
        for question, answer, other, sure in zip(
            batch, answers, zoomed, expected[start:], strict=False
        ):
            assert answer.confidence == pytest.approx(sure, abs=TOLERANCE)
            if sure >= gate:
                stood += 1
                ids, _ = family.stock(question.images[0], question.text)
                assert (answer.text, answer.regions) == (said(family, ids), ())
                assert answer.reason == f"the first answer is {sure:.2f} sure (gate={gate:g})"
            else:
                assert (answer.text, answer.regions) == (other.text, other.regions)
                assert answer.reason == other.reason
    assert 0 < stood < len(questions)


def test_a_gate_of_beams_reads_the_answer_that_stands(
    family: Family, questions: list[Question]
) -> None:
    beams = {"num_beams": 3, "max_new_tokens": NEW_TOKENS}
    for answer in engine(family, gate=1e-9).ask_batch(questions[:6], beams):
        assert answer.confidence is not None
        assert 0 <= answer.confidence <= 1
    stock = ZoomModel(family.backbone, proposer="none").ask_batch(questions[:6], beams)
    gated = engine(family, gate=1e-9).ask_batch(questions[:6], beams)
    stands = [(a.text, s.text) for a, s in zip(gated, stock, strict=True) if a.confidence]
    assert stands
    assert all(own == other for own, other in stands)


@pytest.mark.parametrize("proposer", ["attention", "vicrop"])
def test_the_gate_serves_every_proposer(
    family: Family, questions: list[Question], proposer: str
) -> None:
    from sdrpn.config import LabelConfig, LayerHeads

    labels = LabelConfig(grounding=(LayerHeads(1),), sink=(), vicrop_layer=1)
    zoom = replace(family.zoom, gate=float(np.median(confidences(family, questions))))
    model = ZoomModel(family.backbone, proposer=proposer, zoom=zoom, labels=labels)
    answers = model.ask_batch(questions, {"max_new_tokens": NEW_TOKENS})
    sure = [a for a in answers if a.reason and "sure" in a.reason]
    assert 0 < len(sure) < len(answers)
    assert {bool(a.regions) for a in answers} == {True, False}


def test_losses_are_of_what_the_gate_chose(family: Family, questions: list[Question]) -> None:
    chosen = questions[:10]
    expected = confidences(family, chosen)
    gate = float(np.median(expected)) + 1e-5
    words = ["red"] * len(chosen)
    gated = engine(family, gate=gate).loss_batch(chosen, words)
    stock = ZoomModel(family.backbone, proposer="none").loss_batch(chosen, words)
    whole = engine(family).loss_batch(chosen, words)
    for (loss, _, answer), (plain, _, _), (zoomed, _, _) in zip(gated, stock, whole, strict=True):
        sure = answer.confidence is not None and answer.confidence >= gate
        assert loss == pytest.approx(plain if sure else zoomed, abs=TOLERANCE)


def test_a_streamer_cannot_take_an_answer_back(family: Family, questions: list[Question]) -> None:
    class Streamer:
        def put(self, value: Any) -> None: ...

        def end(self) -> None: ...

    with pytest.raises(ValueError, match="streamer needs gate=None"):
        engine(family, gate=0.5).ask_batch(questions[:1], {"streamer": Streamer()})


# --- the learned gate --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_gate(family: Family) -> RPN:
    rpn = RPN(replace(family.rpn.config, gate=True))
    weights = family.rpn.state_dict()
    rng = np.random.default_rng(3)
    width = rpn.config.hidden_size
    weights["gate.weight"] = torch.tensor(rng.standard_normal((1, width)) / width**0.5).float()
    weights["gate.bias"] = torch.tensor([0.1])
    rpn.load_state_dict(weights)
    return rpn.eval().requires_grad_(False)


def test_a_learned_gate_drops_regions_and_nothing_else(
    family: Family, questions: list[Question], with_gate: RPN
) -> None:
    settings = {"max_new_tokens": NEW_TOKENS}
    whole = engine(family).ask_batch(questions, settings)
    assert {answer.gate for answer in whole} == {None}
    model = ZoomModel(family.backbone, with_gate, zoom=family.zoom)
    noted = model.ask_batch(questions, settings)
    assert [(a.text, a.regions) for a in noted] == [(a.text, a.regions) for a in whole]
    threshold = float(np.median([a.gate for a in noted if a.gate is not None and a.regions]))
    model.zoom = replace(family.zoom, learned_gate=threshold)
    answers = model.ask_batch(questions, settings)
    stock = ZoomModel(family.backbone, proposer="none").ask_batch(questions, settings)
    skipped = 0
    for answer, before, plain in zip(answers, whole, stock, strict=True):
        assert answer.gate is not None
        if answer.gate < threshold and before.regions:
            skipped += 1
            reason = f"the learned gate gives {answer.gate:.2f} (learned_gate={threshold:g})"
            assert (answer.text, answer.regions, answer.reason) == (plain.text, (), reason)
        else:
            assert (answer.text, answer.regions) == (before.text, before.regions)
    assert skipped


def test_a_learned_gate_needs_an_rpn_with_one(family: Family, questions: list[Question]) -> None:
    with pytest.raises(ValueError, match="learned_gate needs an RPN with a gate: train one"):
        engine(family, learned_gate=0.5).ask_batch(questions[:1])


def test_a_saved_gate_is_the_same(family: Family, with_gate: RPN, tmp_path: Any) -> None:
    with_gate.save_pretrained(tmp_path)
    loaded = RPN.from_pretrained(tmp_path)
    assert loaded.config.gate
    assert loaded.gate is not None
    assert with_gate.gate is not None
    assert torch.equal(loaded.gate.weight, with_gate.gate.weight)
    states = torch.ones(2, loaded.config.hidden_size)
    expected = torch.sigmoid(states @ with_gate.gate.weight.T + 0.1)[:, 0]
    found = loaded.gate_probability(states)
    assert found is not None
    assert torch.allclose(found, expected)
