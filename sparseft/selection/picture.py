"""What trains, as a picture: the trained share of each weight, by layer and role. For trackers, which take pixels."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from torch import nn

from sparseft.models.spec import ModelSpec
from sparseft.models.step_cost import trained_by_linear

if TYPE_CHECKING:
    import numpy as np

INK = "#1b1f24"


def trained_shares(model: nn.Module, spec: ModelSpec) -> dict[tuple[str, int], float]:
    """By role and decoder layer: entries that train, per entry of the linears there. Of a low-rank adapter the entries
    are its own, and a linear that trains whole has the share 1. spec: the plain model's."""
    trained: defaultdict[tuple[str, int], int] = defaultdict(int)
    weights: defaultdict[tuple[str, int], int] = defaultdict(int)
    place = {name: (_role(spec.path_of(name)), spec.layer_of[name]) for name in spec.linears}
    for name, (rows, columns) in spec.linears.items():
        weights[place[name]] += rows * columns
    for linear, count in trained_by_linear(model, spec).items():
        if linear in place:  # else one that no adapter trains
            trained[place[linear]] += count
    return {at: min(1.0, trained[at] / size) for at, size in weights.items()}


def _role(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`."""
    return ".".join(part for part in name.split(".")[-3:] if not part.isdigit() and part not in ("layers", "h"))


def draw_shares(shares: dict[tuple[str, int], float]) -> np.ndarray:
    """The shares as a heat map, roles down and layers across: uint8 (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    roles = list(dict.fromkeys(role for role, _ in shares))
    layers = sorted({layer for _, layer in shares})
    table = np.array([[shares.get((role, layer), np.nan) for layer in layers] for role in roles])
    figure = Figure(
        figsize=(max(6.0, 2.5 + 0.32 * len(layers)), 1.4 + 0.36 * len(roles)), dpi=100, layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(100 * table, cmap="Blues", vmin=0.0, aspect="auto")
    axes.set_xticks(range(0, len(layers), max(1, len(layers) // 16)), labels=layers[:: max(1, len(layers) // 16)])
    axes.set_yticks(range(len(roles)), labels=roles)
    axes.set_xlabel("layer", color=INK)
    axes.set_title("what trains: share of each weight", color=INK, fontsize=11)
    figure.colorbar(image, ax=axes, format="%.3g %%")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
