"""What base and adapter answered to the same prompts: side by side, and as the adapter learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseft.report.html import listed
from sparseft.report.numbers import count
from sparseft.report.run_data import Run

STEPS = 12  # of one prompt and run, the first and the last among them
PROMPTS = 50
LENGTH = 4000  # characters of a text


def sample_answers(runs: Sequence[Run]) -> dict[str, Any] | None:
    """By prompt the base's answer and the last one of each run's adapter, with a single run the earlier ones too; None
    where no run has any."""
    prompts = list(dict.fromkeys(answer.asked for run in runs for answer in run.answers))
    if not prompts:
        return None
    shown = [{"prompt": _cut(asked[0]), "answers": _answers(runs, asked)} for asked in prompts[:PROMPTS]]
    note = "Greedy answers to the prompts of trainer.sample_prompts."
    if len(prompts) > PROMPTS:
        note += f" The first {PROMPTS} of {count(len(prompts))} prompts; all are in samples.jsonl."
    without = [run.label for run in runs if not run.answers]
    if without:
        note += f" None were taken of {listed(without)}."
    return {"note": note, "prompts": shown}


def _answers(runs: Sequence[Run], asked: tuple[str, str]) -> list[dict[str, Any]]:
    single = len(runs) == 1
    cells: list[dict[str, Any]] = []
    bases = {run.label: [a.text for a in run.answers if a.base and a.asked == asked] for run in runs}
    texts = dict.fromkeys(found[-1] for found in bases.values() if found)
    for text in texts:
        whose = [label for label, found in bases.items() if found and found[-1] == text]
        name = "base" if len(texts) == 1 else f"base of {listed(whose)}"
        cells.append({"name": name, "text": _cut(text), "same": False, "earlier": [], "left": 0})
    for run in runs:
        by_step = {a.step: a.text for a in run.answers if not a.base and a.asked == asked}  # the last of a step counts
        if not by_step:
            continue
        *earlier, (step, text) = sorted(by_step.items())
        name = f"after step {step:,.0f}" if single else f"{run.label}, after step {step:,.0f}"
        few = min(len(earlier), STEPS - 1) if single else 0  # evenly spread, the first among them
        kept = [earlier[place * len(earlier) // few] for place in range(few)]
        cells.append(
            {
                "name": name,
                "text": _cut(text),
                "same": bool(bases[run.label]) and bases[run.label][-1] == text,
                "earlier": [(f"after step {at:,.0f}", _cut(was)) for at, was in kept],
                "left": len(earlier) - len(kept) if single else 0,
            }
        )
    return cells


def _cut(text: str) -> str:
    if not text.strip():
        return "(empty)" if not text else f"(only white space: {text!r})"
    if len(text) <= LENGTH:
        return text
    return f"{text[:LENGTH]}… ({count(len(text) - LENGTH)} more characters in samples.jsonl)"
