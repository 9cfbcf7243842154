"""Draws the pictures of docs/images: what each method trains, and the way of a run.

    python scripts/draw_docs.py            # writes them
    python scripts/draw_docs.py --check    # exit code 1 where they are not what this file draws

SVG with the colours of the charts, on paper of their own, light or dark as the system is; the same bytes every time.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from sparseft.report.charts import DARK, LIGHT

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"

H, KV, FFN, GAP = 64, 32, 160, 26  # pictured sizes: hidden, key/value width, intermediate; space between matrices
TOP = 40
# name: (width = input features, height = output features)
MATRICES = {"q": (H, H), "k": (H, KV), "v": (H, KV), "o": (H, H), "gate": (H, FFN), "up": (H, FFN), "down": (FFN, H)}
BLOCK = 8


def svg(width: int, height: int, label: str, content: list[str]) -> str:
    style = (
        f"svg {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }} "
        "text { font: 14px system-ui, sans-serif; fill: var(--ink); } .muted { fill: var(--muted); font-size: 12px; } "
        ".frozen { fill: var(--grid); stroke: var(--rule); } .trains { fill: var(--series-1); } "
        ".may { fill: var(--series-1); fill-opacity: .28; } .second { fill: var(--series-2); } "
        ".box { fill: var(--card); stroke: var(--rule); } .store { fill: var(--paper); stroke: var(--muted); } "
        ".way { fill: none; stroke: var(--muted); stroke-width: 1.5; marker-end: url(#tip); } "
        ".tip { fill: var(--muted); }"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}"><style>{style}</style>'
        '<rect width="100%" height="100%" rx="6" style="fill: var(--paper)"/>'
    )
    return "\n".join([head, *content, "</svg>"]) + "\n"


def rect(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{more}/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    named = f' class="{kind}"' if kind else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


# ---- what a method trains of one decoder layer ----


def places() -> dict[str, tuple[int, int, int, int]]:
    """x, y, width and height of each matrix in the picture."""
    found, x = {}, GAP
    for name, (width, height) in MATRICES.items():
        found[name] = (x, TOP, width, height)
        x += width + GAP
    return found


def columns(place: tuple[int, int, int, int], chosen: list[int], kind: str, thick: int = 2) -> list[str]:
    x, y, _, height = place
    return [rect(x + column, y, thick, height, kind) for column in chosen]


def rows(place: tuple[int, int, int, int], chosen: list[int], kind: str, thick: int = 2) -> list[str]:
    x, y, width, _ = place
    return [rect(x, y + row, width, thick, kind) for row in chosen]


def s2ft(draw: random.Random) -> list[str]:
    """Heads of o and channels of down; by ratios also heads of q, k, v and channels of gate and up."""
    where, head, channels = places(), 16, sorted(draw.sample(range(2, FFN - 2, 4), 7))
    found = rows(where["q"], [2 * head], "may", head) + rows(where["k"], [head], "may", head)
    found += rows(where["v"], [head], "may", head) + columns(where["o"], [2 * head], "trains", head)
    for name in ("gate", "up"):
        found += rows(where[name], channels, "may")
    return found + columns(where["down"], channels, "trains")


def sylva(draw: random.Random) -> list[str]:
    """Blocks where a row and a column both count."""
    found = []
    for x, y, width, height in places().values():
        across = [draw.random() ** 3 for _ in range(width // BLOCK)]
        down = [draw.random() ** 3 for _ in range(height // BLOCK)]
        cells = [(a * b, column, row) for row, a in enumerate(down) for column, b in enumerate(across)]
        for _, column, row in sorted(cells, reverse=True)[: max(2, len(cells) // 14)]:
            found.append(rect(x + column * BLOCK, y + row * BLOCK, BLOCK, BLOCK, "trains"))
    return found


def paca(draw: random.Random) -> list[str]:
    """As many input features of every linear, at random."""
    found = []
    for place in places().values():
        found += columns(place, sorted(draw.sample(range(0, place[2] - 2, 4), 3)), "trains")
    return found


def losia(draw: random.Random) -> list[str]:
    """Where a few rows cross a few columns of every linear, at random."""
    found = []
    for x, y, width, height in places().values():
        across = sorted(draw.sample(range(0, width - 3, 5), max(3, width // 20)))
        for down in sorted(draw.sample(range(0, height - 3, 5), max(3, height // 20))):
            found += [rect(x + place, y + down, 4, 4, "trains") for place in across]
    return found


def lora(draw: random.Random) -> list[str]:
    """B beside the weight and A below it."""
    found = []
    for x, y, width, height in places().values():
        found += [rect(x + width + 3, y, 5, height, "trains"), rect(x, y + height + 3, width, 5, "trains")]
    return found


def dora(draw: random.Random) -> list[str]:
    """LoRA, and a magnitude for each output feature."""
    return lora(draw) + [rect(x - 7, y, 4, height, "second") for x, y, _, height in places().values()]


def full(draw: random.Random) -> list[str]:
    return [rect(*place, "trains") for place in places().values()]


METHODS = {
    "s2ft": (s2ft, "whole heads of o, whole channels of down; pale: what ratios add"),
    "sylva": (sylva, "the most important blocks of every linear"),
    "paca": (paca, "a few input features of every linear"),
    "losia": (losia, "the crossings of a few rows and columns; of every linear, chosen anew layer by layer"),
    "lora": (lora, "two thin matrices beside each frozen weight"),
    "dora": (dora, "LoRA and, left, a magnitude for each output feature"),
    "full": (full, "every weight, also embeddings and norms"),
}


def method_picture(name: str) -> str:
    draw, words = METHODS[name]
    content = []
    for matrix, (x, y, width, height) in places().items():
        content += [rect(x, y, width, height, "frozen"), text(x + width / 2, y - 10, matrix)]
    content += draw(random.Random(3))
    down = places()["down"]
    for line, part in enumerate(words.split("; ")):
        content.append(text(down[0], TOP + H + 42 + 18 * line, part, "muted", "start"))
    return svg(down[0] + FFN + 180, TOP + FFN + 24, f"What {name} trains of a decoder layer: {words}", content)


# ---- the way of a run ----

BOXES = {  # name: (column, row, lines); stores are what lies on disk
    "words": (1, 0, ["sparseft train", "method=sylva sparsity=0.984"]),
    "cli": (1, 1, ["cli", "options, one run or a sweep, exit codes"]),
    "conf": (0, 2, ["conf/*.yaml"]),
    "compose": (1, 2, ["compose", "words and YAML → RunConfig, checked once"]),
    "commands": (1, 3, ["commands", "run(config) → result, render(result)"]),
    "job": (1, 4, ["training/job", "set up → select → attach → train → finish"]),
    "files": (0, 3, ["data files, hub sets"]),
    "data": (0, 4, ["data", "records → examples → tokens → batches"]),
    "base": (2, 3, ["base model"]),
    "models": (2, 4, ["models", "load, roles of linears, what cannot train"]),
    "importance": (0, 5, ["importance", "statistics over calibration samples"]),
    "selection": (1, 5, ["selection", "budget → scores → indices"]),
    "adapters": (2, 5, ["adapters", "sparse | peft | full, the same verbs"]),
    "trainer": (1, 6, ["training/trainer", "transformers' Trainer; checkpoints, failures"]),
    "layers": (2, 6, ["layers", "frozen weight + delta on a pattern"]),
    "run": (1, 7, ["run folder (runs/folder.py)"]),
    "kernels": (2, 7, ["kernels", "products in torch and Triton"]),
    "evaluation": (0, 8, ["evaluation", "lm-eval tasks, base beside adapter"]),
    "report": (1, 8, ["report, bench", "pages and tables"]),
}
STORES = {"conf", "files", "base", "run"}
WAYS = """words>cli cli>compose conf>compose compose>commands commands>job files>data data>job base>models models>job
job>selection importance>selection job>adapters adapters>layers layers>kernels run>report run>evaluation
trainer>run""".split()
WIDE, TALL, STEP_X, STEP_Y = 284, 46, 318, 76


def corner(name: str) -> tuple[int, int]:
    column, row, _ = BOXES[name]
    return 16 + column * STEP_X, 16 + row * STEP_Y


def way(one: str, other: str) -> str:
    (x1, y1), (x2, y2) = corner(one), corner(other)
    if x1 == x2:
        return f'<path class="way" d="M{x1 + WIDE / 2:g} {y1 + TALL}V{y2 - 2}"/>'
    side = (x1 + WIDE, x2 - 2) if x2 > x1 else (x1, x2 + WIDE + 2)
    if y1 == y2:  # side by side
        return f'<path class="way" d="M{side[0]} {y1 + TALL / 2:g}H{side[1]}"/>'
    middle = (side[0] + side[1]) / 2
    return f'<path class="way" d="M{side[0]} {y1 + TALL - 10}H{middle:g}V{y2 + TALL / 2:g}H{side[1]}"/>'


def run_picture() -> str:
    content = [
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    ]
    content += [way(*arrow.split(">")) for arrow in WAYS]
    x, y = corner("job")  # from the job past the selection to the trainer
    content.append(f'<path class="way" d="M{x} {y + 34}H{x - 12}V{corner("trainer")[1] + 23}H{x - 2}"/>')
    for name, (_, _, lines) in BOXES.items():
        x, y = corner(name)
        content.append(rect(x, y, WIDE, TALL, "store" if name in STORES else "box", ' rx="5"'))
        if len(lines) == 1:
            content.append(text(x + WIDE / 2, y + 28, lines[0]))
        else:
            content += [text(x + WIDE / 2, y + 20, lines[0]), text(x + WIDE / 2, y + 37, lines[1], "muted")]
    height = 16 + 9 * STEP_Y - (STEP_Y - TALL) + 16
    return svg(16 + 2 * STEP_X + WIDE + 16, height, "The way of a run, from its words to its report", content)


def pictures() -> dict[str, str]:
    """The pictures by their files' names."""
    return {f"method-{name}.svg": method_picture(name) for name in METHODS} | {"way-of-a-run.svg": run_picture()}


def main(words: list[str]) -> int:
    if words not in ([], ["--check"]):
        print("usage: python scripts/draw_docs.py [--check]", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    stale = [
        name
        for name, content in pictures().items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != content
    ]
    if words and stale:
        print(f"{', '.join(stale)}: not what this file draws; run python scripts/draw_docs.py", file=sys.stderr)
        return 1
    for name in stale:
        (FOLDER / name).write_text(pictures()[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
