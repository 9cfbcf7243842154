"""What an interrupted calibration leaves, so that the next one goes on from there: one safetensors file for the
statistics of a rank and one for the scores it has finished, each written aside and then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft import console
from sparseft.files.atomic import asides, replaced_file
from sparseft.files.untrusted import parse_json

# Between two saves pass at least so many seconds, and at least so many times as long as the last save took: the sums
# of a large model are tens of gigabytes.
SAVE_SECONDS = 30.0
SAVE_COST = 20.0

STATISTICS, SCORES = "statistics", "scores"


def saved_samples(folder: Path) -> int:
    """Samples that the statistics in a folder have seen, 0 where there are none."""
    with contextlib.suppress(Exception):  # what is wrong with the file is said when it is loaded
        from safetensors import safe_open

        with safe_open(next(folder.glob(f"{STATISTICS}-0of*.safetensors")), "pt") as file:
            return max(0, int(parse_json(file.metadata()["meta"])["done"][1]))
    return 0


def _hash(tensors: Mapping[str, Tensor], meta: str) -> str:
    """SHA-256 over names, types, shapes and bytes of contiguous CPU tensors, and the description's text."""
    import torch

    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class CalibrationState:
    """The folder of an unfinished calibration. With `folder` None nothing is kept and nothing found.

    Args:
        folder: made when something is saved.
        key: everything but the samples that the state depends on, as JSON; another key's state is not used.
        share: (rank, ranks); each rank has files of its own.
    """

    def __init__(self, folder: Path | None, key: Any, share: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        self.digest = hashlib.sha256(json.dumps([key, share], sort_keys=True).encode()).hexdigest()
        self.suffix = f"-{share[0]}of{share[1]}.safetensors"
        self._saved_at = time.monotonic()
        self._last_cost = 0.0

    def due(self) -> bool:
        """Whether it is time to save again."""
        waited = time.monotonic() - self._saved_at
        return self.folder is not None and waited >= max(SAVE_SECONDS, SAVE_COST * self._last_cost)

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replaces a file. A full disk costs the chance to resume, not the work: it is said, and that is all."""
        if self.folder is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        start = time.monotonic()
        path = self.folder / (name + self.suffix)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {key: value.cpu().contiguous() for key, value in tensors.items()}
            content = {"key": self.digest, "meta": json.dumps(meta)}
            with replaced_file(path, sync=False) as aside:
                save_file(kept, aside, content | {"sha256": _hash(kept, content["meta"])})
        except (OSError, SafetensorError) as error:
            console.warn(f"{self.folder}: what is done so far could not be kept, so it cannot be resumed ({error})")
            self.folder = None
        self._saved_at = time.monotonic()
        self._last_cost = self._saved_at - start

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A file's tensors and description; None where there is none, or, with a word, where it is of no use."""
        if self.folder is None:
            return None
        path = self.folder / (name + self.suffix)
        for aside in asides(self.folder, path.name):  # of a process that was killed while it saved
            aside.unlink(missing_ok=True)
        if not path.is_file():
            return None
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                content = file.metadata() or {}
                if content.get("key") != self.digest:
                    console.log(f"{path}: belongs to other settings, so calibration starts anew")
                    return None
                found = {key: file.get_tensor(key) for key in file.keys()}
            if content.get("sha256") != _hash(found, content.get("meta", "")):
                raise ValueError("its content is not what was written")
            return found, parse_json(content["meta"])
        except Exception as error:  # a damaged file of any kind
            console.warn(f"{path}: cannot be used, so calibration starts anew ({error})")
            return None
