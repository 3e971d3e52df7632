"""The page of the gates, docs/gates.md, from what `gates.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdrpn_eval.results.stats import with_interval

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
"""Shares of skipped questions."""

PAGE = """\
# Gates: when to zoom

A zoom that would not change the answer only costs time. Two gates skip it, both off by default:

- **Confidence**, `gate=0.9`: the first answer stands if its least sure token is at least that sure.
  Needs no training. A question that zooms pays for the first answer too, so the gate saves time
  only if enough answers stand: at the proportions of 7B more than a quarter to a half of them, at
  its full size on a CPU more than half
  ([speed.md](speed.md#the-gate-fastest-and-where-a-batch-loses)).
- **Learned**, `learned_gate=T`: a linear probe on the RPN's state of the last prompt token, trained
  by `sdrpn train-gate` on labels without annotation ([train.md](train.md#a-gate)). Costs nothing at
  inference, and skips the crop, not the RPN.

## The learned gate on the embedded model

**It is not good enough there; use the confidence gate.** Skipping 20 % of the zooms costs the
learned gate {learned_cost:.1f} points, the confidence gate {confidence_cost:.1f}.

Measured on {questions} fresh questions about {measure_scenes} scenes, of which the zoom mends
{mended} and spoils {spoiled} (stock {stock:.1f} %, zoom {zoom:.1f} %). AUC is that of ranking the
mended questions first. The other columns are the exact match, in percent, if that share of the
questions, the lowest ranked, is not zoomed. Intervals are 95 %, by image. The rows of annotated
labels are probes trained on the generator's answers to the same questions: what better labels, or a
later state, would give.

{table}

- The labels are not the limit. Both rules agree with the generator's answers on nearly every
  question, and the same probe trained on these answers is no better:

  | rule | questions | label 1 | label 0 | ignored | agree with the generator |
  |---|---|---|---|---|---|
{labels}

- Nor is their number: the AUC is {fewer} and {all_auc} with {all_labels}.
- The state is. The model answers "red checked" to "what pattern is on the red disc ?": at the end
  of the prompt, even behind the last layer, it is about to repeat the colour. Behind that word,
  where the next token is the pattern, the same probe reaches an AUC of {later}. The confidence of
  the whole answer includes that token.

**What will not carry over to real models.** The labels: this zoom is nearly always right, so the
rules have little to filter and cannot be told apart; real zooms fail and harm more often. The
verdict, perhaps: where the first token of an answer is the one that matters, the state at the end
of the prompt may know more. `sdrpn train-gate` prints the held-out AUC of both gates on your
questions; use the better.

Created by `python -m tools.tiny_vstar.gates --docs docs` ([numbers](gates.json)).
"""


def table(result: Mapping[str, Any]) -> str:
    """The table of all gates in percent, with 95 % intervals by image."""
    shares = " | ".join(f"{100 * share:.0f} %" for share in SHARES)
    lines = [f"| gate | AUC | {shares} |", "|---|---|" + "---|" * len(SHARES)]
    for gate in result["gates"]:
        cells = [_cell(gate["auc"], 1, ".2f")]
        cells += [_cell(gate["accuracy"][f"{share:g}"], 100, ".1f") for share in SHARES]
        lines.append(f"| {gate['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(estimate: Sequence[float], scale: float, digits: str) -> str:
    if len(estimate) == 1:
        return f"{scale * estimate[0]:{digits}}"
    return with_interval(estimate, scale, digits)


def page(result: Mapping[str, Any]) -> str:
    """The page of what was measured."""
    names = ("questions", "labels 1", "labels 0", "ignored")
    labels = [
        f"  | `{rule}` | {' | '.join(str(found[name]) for name in names)} | "
        f"{100 * found['right']:.1f} % |"
        for rule, found in result["labels"].items()
    ]
    fewer = [f"{found[0]:.2f} with {n}" for n, found in result["fewer"].items()]
    cost = {
        gate["name"]: 100 * (gate["accuracy"]["0"][0] - gate["accuracy"]["0.2"][0])
        for gate in result["gates"]
    }
    auc = {gate["name"]: f"{gate['auc'][0]:.2f}" for gate in result["gates"]}
    counts = result["labels"]["consensus"]
    return PAGE.format(
        table=table(result),
        labels="\n".join(labels),
        fewer=", ".join(fewer),
        all_labels=counts["labels 1"] + counts["labels 0"],
        all_auc=auc["learned, `consensus`"],
        learned_cost=cost["learned, `consensus`"],
        confidence_cost=cost["confidence of the first answer"],
        later=auc["learned, annotated labels, last layer, a token later"],
        stock=100 * result["stock"],
        zoom=100 * result["zoom"],
        **{n: result[n] for n in ("questions", "measure_scenes", "mended", "spoiled")},
    )
