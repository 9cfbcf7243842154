"""Training questions that stand in a test set, found by a hash of their normalised text.

Two questions count as the same where they agree after casefolding with punctuation and white space left out; signs of
arithmetic stay, so that `3 + 4` and `3 - 4` differ. A run keeps the hashes of its training questions, 8 bytes each, in
`train_questions.safetensors`, and `sparseft eval` looks up every test question there.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparseft.errors import UserError
from sparseft.files.atomic import replaced_file
from sparseft.runs.folder import QUESTIONS

NORMALISATION = "1"  # changes with `normalised`: hashes of another one cannot be compared

# Words, signs that are no punctuation, and signs that are punctuation elsewhere but arithmetic between two numbers.
_TOKENS = re.compile(r"[^\W_]+|[+=<>^×÷−$€£]|(?<=\d)\s*[-*/.%:]\s*(?=\d)")
# Fields of a test record that may hold its question, for tasks of any origin.
_QUESTIONS = ("question", "query", "problem", "instruction", "goal", "ctx", "context", "sentence", "prompt")


def normalised(text: str) -> str:
    """The text as it is compared: casefolded words and signs, one space between them."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(token.strip() for token in _TOKENS.findall(text))


def question_hash(text: str) -> int | None:
    """64 bits of the normalised text; None if nothing is left of it."""
    text = normalised(text)
    if not text:
        return None
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def test_questions(record: dict[str, Any], prompt: str | None = None) -> list[str]:
    """What of a test record may have been a training question: its question, with its input or its choices, and the
    whole prompt (without shots)."""
    found = [prompt] if isinstance(prompt, str) else []
    for name in _QUESTIONS:
        text = record.get(name)
        if not isinstance(text, str) or not text.strip():
            continue
        found.append(text)
        if name == "instruction" and record.get("input"):
            found[-1] = f"{text}\n{record['input']}"
        choices = record.get("choices")
        if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
            letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            found.append("\n".join([text, *choices]))
            found.append("\n".join([text, *(f"{a}. {b}" for a, b in zip(letters, choices, strict=False))]))
    return found


class QuestionHashes:
    """The questions of a training set, as sorted hashes."""

    def __init__(self, hashes: Iterable[int] | np.ndarray) -> None:
        values = hashes if isinstance(hashes, np.ndarray) else np.fromiter(hashes, np.uint64)
        self.hashes = np.unique(values.astype(np.uint64, copy=False))

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, text: str) -> bool:
        value = question_hash(text)
        if value is None or not len(self.hashes):
            return False
        place = int(np.searchsorted(self.hashes, np.uint64(value)))
        return place < len(self.hashes) and int(self.hashes[place]) == value

    def overlap(self, questions: Iterable[Sequence[str]]) -> list[int]:
        """The positions of those test questions of which any wording was seen."""
        return [index for index, wordings in enumerate(questions) if any(text in self for text in wordings)]

    def save(self, folder: Path) -> Path:
        """Writes `train_questions.safetensors` into `folder`: aside, then renamed."""
        from safetensors.numpy import save_file

        path = folder / QUESTIONS
        with replaced_file(path) as aside:  # safetensors of older versions knows no uint64; the bits are the same
            save_file({"hashes": self.hashes.view(np.int64)}, aside, metadata={"normalisation": NORMALISATION})
        return path

    @classmethod
    def load(cls, folder: Path) -> QuestionHashes | None:
        """What `save` left in `folder`; None where nothing is there. UserError for a file that cannot be used."""
        from safetensors import SafetensorError, safe_open

        path = folder / QUESTIONS
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                version = (file.metadata() or {}).get("normalisation")
                hashes = file.get_tensor("hashes")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error}).") from error
        if hashes.dtype != np.int64 or hashes.ndim != 1:
            raise UserError(f"{path}: expected one row of int64 hashes, got {hashes.dtype} of shape {hashes.shape}.")
        if version != NORMALISATION:
            raise UserError(f"{path}: written by another version of sparseft, whose questions cannot be compared.")
        return cls(hashes.view(np.uint64))
