"""How much a unit (head, channel, row, column or block) matters: scores that `selection.py` ranks."""

from __future__ import annotations

from sparseft.importance.scores import compute_scores

__all__ = ["compute_scores"]
