"""Loss spikes: steps whose loss lies far above what the steps before them had."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

WINDOW, LEAST = 64, 16  # good steps that are looked back on, and how many there must be
FAR = 6.0  # standard deviations above their median
SPREAD = 0.05  # what a standard deviation counts as at least, of the median: no smooth loss has spikes of a hair
NAMED = 10  # spikes that are named each; all are counted
ROW = "row"  # in an example, its place in the training data


@dataclass
class Spike:
    """A step, its loss and the median of the steps before it, nats a token, and the rows that it was made of."""

    step: int
    loss: float
    median: float
    rows: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" and {len(self.rows) - 16} more" if len(self.rows) > 16 else ""
        shown = ", ".join(map(str, self.rows[:16])) + more
        rows = f" (rows {shown} of the training data, from 0)" if self.rows else ""
        above = f"far above the median of the steps before, {self.median:.4g}"
        return f"step {self.step}: the loss is {self.loss:.4g}, {above}{rows}"


class Spikes:
    """Those of a run; a checkpoint keeps `kept`, from which a continued run goes on.

    The spread of the last losses is the median of their distances from their own median, times 1.4826: for normal ones
    that is the standard deviation, and a spike in the window does not change it. A step of fewer tokens than usual may
    lie farther off, as the mean over so many does.
    """

    def __init__(self, count: int = 0, recent: Sequence[Sequence[float]] = ()) -> None:
        self.count = count
        self.recent = [(loss, tokens) for loss, tokens in recent]

    def judge(self, step: int, loss: float, tokens: int, rows: list[int]) -> Spike | None:
        """Takes in a good step, with the tokens that its loss is the mean of, and says whether that is a spike."""
        spike = None
        if len(self.recent) >= LEAST:
            losses = [each for each, _ in self.recent]
            median, usual = statistics.median(losses), statistics.median(each for _, each in self.recent)
            spread = 1.4826 * statistics.median(abs(each - median) for each in losses)
            few = math.sqrt(max(1.0, usual / max(1, tokens)))
            if loss > median + FAR * few * max(spread, SPREAD * abs(median)):
                self.count += 1
                spike = Spike(step, loss, median, rows)
        self.recent = [*self.recent, (loss, tokens)][-WINDOW:]
        return spike

    def kept(self) -> dict[str, Any]:
        """What `Spikes(**kept)` goes on from."""
        return {"count": self.count, "recent": self.recent}


class Numbered(Dataset):
    """A data set whose examples say where they stand in it (`ROW`)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.lengths = getattr(dataset, "lengths", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], ROW: int(index)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
