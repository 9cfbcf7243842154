"""What a run selected: the share of each layer and role, where in the weights it lies, and how the scores fell."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseft.errors import UserError
from sparseft.files.untrusted import why
from sparseft.report.charts import NARROW, Band, Panel, Series, drawn, heat_map, line_chart
from sparseft.report.numbers import count, number, percent
from sparseft.report.run_data import Run, read_indices

Place = tuple[str, str]  # layer and role

LARGEST = 1e9  # features of a weight's side that are believed
CELLS = 16  # of a weight's picture along a side; heads and blocks up to twice as many, each its own
SHADES = 4  # that a cell may have
ACROSS = 32  # layers beside each other; further ones below
HEADS = ("q", "k", "v", "o")
USUAL = (*HEADS, "gate", "up", "down")  # the order in which these are read
PANEL = 290  # width of the scores' charts, in CSS pixels: as many beside each other as there is room for
LOG_FROM = 20.0  # scores that differ by more are drawn on a logarithmic axis
LEVELS, KEPT_LEVELS = 7, 3  # how many numbers `candidates` of selection.json has of each


def layer_and_role(module: str) -> Place:
    """`model.layers.3.self_attn.q_proj` -> ("3", "self_attn.q_proj"): the first number names the layer, later ones
    (experts) fall together; a module outside the layers has the layer ""."""
    layer = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", module)
    if not layer:
        return "", module
    role = re.sub(r"\.\d+(?=\.|$)", "", module[layer.end() :])
    return layer.group(1), role or module[: layer.start()]


@dataclass
class Weights:
    """The linears of one layer and role, several where there are experts."""

    shape: tuple[int, int]
    modules: list[str]
    trained: float = 0.0
    weights: float = 0.0


def selected(run: Run) -> dict[str, Any]:
    """Notes and pictures of what a run trains, or why there are none."""
    nothing: dict[str, Any] = {"chart": {}, "map": [], "map_note": "", "scores": None}
    modules = (run.selection or {}).get("modules")
    if not isinstance(modules, dict) or not modules:
        why_not = "the method selects no part of the weights, or the run stopped before."
        return nothing | {"note": f"There is no selection/selection.json: {why_not}"}
    places: dict[Place, Weights] = {}
    kinds: dict[str, float] = {}
    for module, entry in modules.items():
        entry = entry if isinstance(entry, dict) else {}
        shape = entry.get("shape")
        sides = [number(side) for side in shape] if isinstance(shape, list) else []
        trainable = number(entry.get("trainable"))
        if len(sides) != 2 or not all(side and 1 <= side <= LARGEST for side in sides) or trainable is None:
            return nothing | {"note": f"selection.json says neither shape nor trained weights of {module}."}
        high, wide = (int(side or 0) for side in sides)
        weights = places.setdefault(layer_and_role(module), Weights((high, wide), []))
        weights.modules.append(module)
        weights.trained += trainable
        weights.weights += high * wide
        for kind in ("rows", "columns", "blocks"):
            kinds[kind] = kinds.get(kind, 0.0) + (number(entry.get(kind)) or 0.0)
        kinds["grids"] = kinds.get("grids", 0.0) + bool(number(entry.get("grid")))
    layers = sorted({layer for layer, _ in places}, key=lambda layer: (not layer, int(layer or 0)))
    found_roles = list(dict.fromkeys(role for _, role in places))
    short = {role: _short(role, found_roles) for role in found_roles}
    roles = sorted(found_roles, key=lambda role: USUAL.index(short[role]) if short[role] in USUAL else -1)
    size = number((run.selection or {}).get("block_size"))
    units = [f"{count(many)} {kind}" for kind, many in kinds.items() if many]
    if size is not None and kinds["blocks"]:
        units = [f"{unit} of {size:.0f} × {size:.0f}" if unit.endswith("blocks") else unit for unit in units]
    shares = {place: weights.trained / weights.weights for place, weights in places.items()}
    whole = sum(weights.trained for weights in places.values()) / sum(weights.weights for weights in places.values())
    note = f"{', '.join(units) or 'Nothing'} in {count(len(modules))} weights, all together {percent(whole)} of them."
    alike = {role: {percent(share) for (_, other), share in shares.items() if other == role} for role in roles}
    if same := len(layers) > 1 and all(len(found) == 1 for found in alike.values()):
        by_role = ", ".join(f"{found.pop()} of {short[role]}" for role, found in alike.items())
        note += f" In every layer alike: {by_role}."
    else:
        note += f" Each cell: the share of that weight that trains; the darkest: {percent(max(shares.values()))}."

    def chart(width: int) -> str:
        if width > NARROW:
            return heat_map(roles, layers, lambda role, layer: _share(shares.get((layer, role))), "layer", width=width)
        columns = {short[role]: role for role in roles}
        rows = {f"layer {layer}" if layer else "outside": layer for layer in layers}

        def value(row: str, column: str) -> tuple[float, str] | None:
            return _share(shares.get((rows[row], columns[column])))

        return heat_map([*rows], [*columns], value, "", width=width)

    found = _candidates(run)
    try:
        pictures, darkest = _map(run, places, roles, layers, found)
    except (UserError, ValueError, OSError, MemoryError) as error:
        pictures, darkest = [], f"Where in the weights they lie is not known: {why(error)}"
    return {
        "note": note,
        "chart": {} if same else drawn(chart),
        "map": pictures,
        "map_note": darkest,
        "scores": _scores(run, roles, found),
    }


def _share(share: float | None) -> tuple[float, str] | None:
    return None if share is None else (share, percent(share))


def _short(role: str, roles: Sequence[str]) -> str:
    """`self_attn.q_proj` -> `q`, as long as no other role is called so."""
    short = role.rpartition(".")[2].removesuffix("_proj")
    others = [other.rpartition(".")[2].removesuffix("_proj") for other in roles]
    return short if others.count(short) == 1 else role


# ---- where in the weights ----


def _candidates(run: Run) -> dict[Place, list[dict[str, Any]]]:
    """The entries of `candidates` in selection.json by layer and role, each with its `role` within the linear."""
    every = (run.selection or {}).get("candidates")
    found: dict[Place, list[dict[str, Any]]] = {}
    for name, entry in every.items() if isinstance(every, dict) else ():
        if isinstance(entry, dict):
            module, _, role = name.partition(":")
            found.setdefault(layer_and_role(module), []).append({**entry, "role": role})
    return found


def _map(
    run: Run,
    places: dict[Place, Weights],
    roles: Sequence[str],
    layers: Sequence[str],
    candidates: dict[Place, list[dict[str, Any]]],
) -> tuple[list[dict[str, Any]], str]:
    """Tables of small pictures, one of each weight: rows of `(role, [(label, width, height, paths by shade)])` under
    the heads of their layers; and what is to be said of them."""
    import numpy

    indices = read_indices(run.path)
    block = number((run.selection or {}).get("block_size")) or 0
    grids: dict[Place, Any] = {}
    for place, weights in places.items():
        high, wide = _sides(weights.shape, block, candidates.get(place, []), indices.get(weights.modules[0], {}))
        grid = numpy.zeros((high, wide))
        for module in weights.modules:
            for kind, index in indices.get(module, {}).items():
                grid += _density(kind, index, weights.shape, int(block), (high, wide))
        grids[place] = numpy.clip(grid / len(weights.modules), 0.0, 1.0)
    darkest = {role: max(float(grids[place].max()) for place in grids if place[1] == role) or 1.0 for role in roles}
    tables = []
    for start in range(0, len(layers), ACROSS):
        head = layers[start : start + ACROSS]
        rows = []
        for role in roles:
            cells: list[dict[str, Any] | None] = []
            for layer in head:
                grid = grids.get((layer, role))
                if grid is None:
                    cells.append(None)
                    continue
                weights = places[layer, role]
                what = _words(weights, indices, candidates.get((layer, role), []))
                label = f"layer {layer or 'none'}, {role}: {percent(weights.trained / weights.weights)} trains, {what}"
                high, wide = grid.shape
                cells.append({"label": label, "high": high, "wide": wide, "paths": _paths(grid / darkest[role])})
            rows.append((_short(role, roles), f"{role}: the darkest cell trains {percent(darkest[role])}", cells))
        tables.append({"layers": head, "rows": rows, "cell": max(25, min(64, 800 // len(head)))})
    note = (
        "Each small picture is one weight, outputs downwards and inputs across: where in it the trained entries lie. "
        f"Heads and blocks are drawn one by one up to {2 * CELLS} along a side, finer units together. The more of "
        "a cell trains, the darker it is, as seen in its row."
    )
    return tables, note


def _sides(
    shape: tuple[int, int], block: float, candidates: Sequence[dict[str, Any]], kinds: dict[str, Any]
) -> tuple[int, int]:
    """The cells of a weight's picture: its blocks or heads where these are few, else CELLS or fewer."""
    sides = [min(CELLS, side) for side in shape]
    if block and "blocks" in kinds:
        sides = [math.ceil(side / block) for side in shape]
    for entry in candidates:
        unit = number(entry.get("unit")) or 0
        if entry.get("role") in HEADS and unit > 1:
            side = 1 if entry.get("kind") == "columns" else 0
            if shape[side] % unit == 0:
                sides[side] = int(shape[side] // unit)
    return tuple(side if side <= 2 * CELLS else CELLS for side in sides)  # type: ignore[return-value]


def _density(kind: str, index: Any, shape: tuple[int, int], block: int, cells: tuple[int, int]) -> Any:
    """The share of each cell's entries that rows, columns, blocks or grids train, (high, wide).

    UserError where an index lies outside of the weight.
    """
    import numpy

    if kind == "blocks":
        if block < 1:
            raise UserError("blocks without a block_size in selection.json.")
        units = tuple(math.ceil(side / block) for side in shape)
    else:
        units = shape
    whose = {"rows": (0,), "columns": (1,)}.get(kind, (0, 1))

    def places(own: Any, side: int) -> Any:
        if len(own) and (own.min() < 0 or own.max() >= units[side]):
            raise UserError("selection.safetensors has an index outside of the weight.")
        return own * cells[side] // units[side]

    # Of cell k the units from ⌈k·n/c⌉ up to ⌈(k+1)·n/c⌉.
    room = []
    for side in whose:
        ends = [-(-k * units[side] // cells[side]) for k in range(cells[side] + 1)]
        room.append(numpy.diff(numpy.array(ends)))
    if kind == "blocks":
        counted = numpy.zeros(cells)
        numpy.add.at(counted, (places(index[:, 0], 0), places(index[:, 1], 1)), 1.0)
        return counted / numpy.maximum(numpy.outer(*room), 1)
    if kind == "grid":
        counted = numpy.zeros(cells)
        ends = ((index[:-1] < 0) & (index[1:] >= 0)).nonzero()[0] + 1  # `kernels/grid.py`, which loads torch
        for own in numpy.split(index, ends):
            sides = places(own[own >= 0], 0), places(-1 - own[own < 0], 1)
            down, across = (numpy.bincount(side, minlength=n) for side, n in zip(sides, cells, strict=True))
            counted += numpy.outer(down, across)
        return counted / numpy.maximum(numpy.outer(*room), 1)
    line = numpy.bincount(places(index, whose[0]), minlength=cells[whose[0]]) / numpy.maximum(room[0], 1)
    return numpy.broadcast_to(line[:, None] if kind == "rows" else line[None, :], cells)


def _paths(grid: Any) -> list[tuple[int, str]]:
    """An SVG path of the cells of each shade, 1 the lightest: rectangles as high and as wide as alike cells reach."""
    shades = [[math.ceil(round(float(value) * SHADES, 6)) for value in row] for row in grid]
    runs: dict[int, list[list[int]]] = {}  # by shade: top, left, width, height
    above: dict[tuple[int, int, int], list[int]] = {}
    for top, row in enumerate(shades):
        found: dict[tuple[int, int, int], list[int]] = {}
        left = 0
        while left < len(row):
            width = 1
            while left + width < len(row) and row[left + width] == row[left]:
                width += 1
            if row[left]:
                key = (row[left], left, width)
                if key in above:
                    above[key][3] += 1
                    found[key] = above[key]
                else:
                    found[key] = [top, left, width, 1]
                    runs.setdefault(row[left], []).append(found[key])
            left += width
        above = found
    return [
        (shade, "".join(f"M{left} {top}h{wide}v{high}h-{wide}z" for top, left, wide, high in runs[shade]))
        for shade in sorted(runs)
    ]


def _words(weights: Weights, indices: dict[str, dict[str, Any]], candidates: Sequence[dict[str, Any]]) -> str:
    """What trains of a weight, in words: `heads 2, 5 of 9`, `98 of 1,536 columns`, `3 of 216 blocks`."""
    parts = []
    for entry in candidates:
        unit, units, kept = (number(entry.get(name)) for name in ("unit", "units", "kept"))
        start, kind, role = number(entry.get("start")) or 0, str(entry.get("kind")), entry.get("role")
        if not unit or units is None or kept is None:
            continue
        if role in HEADS and len(weights.modules) == 1:
            index = indices.get(weights.modules[0], {}).get(kind)
            own = [] if index is None else index[(index >= start) & (index < start + unit * units)]
            heads = sorted({int((feature - start) // unit) for feature in own})
            named = ", ".join(map(str, heads)) if len(heads) <= 8 else count(len(heads))
            parts.append(f"{role} heads {named} of {count(units)}" if heads else f"no {role} head of {count(units)}")
        else:
            what = "entries, where rows cross columns" if kind == "grid" else kind
            parts.append(f"{count(kept)} of {count(units)} {what}" + (f" ({role})" if role else ""))
    if parts:
        return "; ".join(parts)
    totals: dict[str, int] = {}
    for module in weights.modules:
        for kind, index in indices.get(module, {}).items():
            totals[kind] = totals.get(kind, 0) + len(index)
    return ", ".join(f"{count(many)} {kind}" for kind, many in totals.items()) or "nothing"


# ---- scores ----


def _scores(run: Run, roles: Sequence[str], found: dict[Place, list[dict[str, Any]]]) -> dict[str, Any]:
    """How the scores of all units fell, by role over the layers, and where the cut lies; or why that is not known."""
    settings = (run.selection or {}).get("method_config")
    settings = settings if isinstance(settings, dict) else {}
    importance, order = str(settings.get("importance") or ""), str(settings.get("order") or "largest")
    if importance == "random":
        return {"note": "What trains was drawn at random, not scored.", "charts": []}
    if not found:
        return {
            "note": "The selection's scores were not kept: it was made by an earlier version, or by hand.",
            "charts": [],
        }
    by_role: dict[str, list[tuple[float, list[float], list[float], float | None]]] = {}
    ordered = sorted(found.items(), key=lambda item: roles.index(item[0][1]) if item[0][1] in roles else len(roles))
    for (layer, role), entries in ordered:
        for entry in entries:
            every, kept = (
                _numbers(entry.get(name), size) for name, size in (("scores", LEVELS), ("kept_scores", KEPT_LEVELS))
            )
            if every:
                name = _short(role, roles) + (f", {entry['role']}" if len(entries) > 1 else "")
                at = float(layer) if layer else 0.0
                by_role.setdefault(name, []).append((at, every, kept, number(entry.get("kept_share"))))
    if not by_role:
        return {"note": "There are no scores to show.", "charts": []}
    cut = {"largest": ("the least that is kept", 0), "smallest": ("the most that is kept", 2)}
    name, which = cut.get(order, ("the median of what is kept", 1))
    panels = [_panel(role, sorted(points, key=lambda point: point[0]), name, which) for role, points in by_role.items()]
    note = (
        f"Importance {importance or 'unknown'} of the units of each role, over the layers: the bands hold the scores "
        f"from 5 to 95 % and from 25 to 75 % of all, the faint line is the largest, the line with dots {name}"
    )
    note += ": what lies above it trains." if which == 0 else "."
    if any(panel.log for panel in panels):
        note += (
            " Axes are logarithmic where scores differ by more than a factor of twenty; scores of 0 are left out there."
        )

    charts = [line_chart([[panel]], "layer", height=190, width=PANEL, legend=False) for panel in panels]
    return {"note": note, "charts": charts}


def _numbers(values: Any, size: int) -> list[float]:
    """`size` finite numbers, or none."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None] if len(found) == size and None not in found else []


def _panel(
    role: str, points: Sequence[tuple[float, list[float], list[float], float | None]], name: str, which: int
) -> Panel:
    every = [value for _, scores, kept, _ in points for value in (*scores, *kept)]
    log = min(every) >= 0 and max(every) > LOG_FROM * min(value for value in (*every, math.inf) if value > 0)
    shares = [share for *_, share in points if share is not None]
    title = role
    if shares:
        lowest, highest = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
        title += f": {lowest if lowest == highest else f'{lowest} to {highest}'} % of the sum is kept"
    kept_line = [(layer, kept[which] if kept else None) for layer, _, kept, _ in points]
    series = [
        Series("median of all", [(layer, scores[3]) for layer, scores, *_ in points], 0),
        Series(name, kept_line, 1, markers=True),
        Series("largest", [(layer, scores[6]) for layer, scores, *_ in points], 0, faint=True),
    ]
    bands = [
        Band("5 to 95 %", [(layer, scores[1], scores[5]) for layer, scores, *_ in points], 0.25),
        Band("25 to 75 %", [(layer, scores[2], scores[4]) for layer, scores, *_ in points], 0.45),
    ]
    return Panel("score", series, title=title, bands=bands, log=log)
