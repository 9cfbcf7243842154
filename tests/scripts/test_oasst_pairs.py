"""`scripts/oasst_pairs.py`: the best- and the worst-ranked reply, wherever in a tree a prompt stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/oasst_pairs.py"


def said(role: str, text: str, rank: int | None = None, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "rank": rank, "replies": list(replies), "lang": "en", **more}


def run(folder: Path, *trees: Any, code: int = 0, words: tuple[str, ...] = ()) -> list[Any]:
    (folder / "trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    command = [sys.executable, str(SCRIPT), str(folder / "trees.jsonl"), str(folder / "pairs.jsonl"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_pairs(tmp_path: Path) -> None:
    again = said("prompter", "And then?", None, said("assistant", "Then b.", 1), said("assistant", "Then a.", 0))
    tree = {
        "prompt": said(
            "prompter", "Why?", None, said("assistant", "Middling.", 1), said("assistant", "Worst.", 2),
            said("assistant", "Best.", 0, again), said("assistant", "Gone.", 3, deleted=True),
        )
    }  # fmt: skip
    alone = {"prompt": said("prompter", "Alone?", None, said("assistant", "Yes.", 0))}
    unranked = {"prompt": said("prompter", "Who?", None, said("assistant", "A."), said("assistant", "B."))}
    assert run(tmp_path, tree, alone, unranked) == [
        {"prompt": [{"role": "user", "content": "Why?"}], "chosen": [{"role": "assistant", "content": "Best."}],
         "rejected": [{"role": "assistant", "content": "Worst."}]},
        {"prompt": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Best."},
                    {"role": "user", "content": "And then?"}],
         "chosen": [{"role": "assistant", "content": "Then a."}],
         "rejected": [{"role": "assistant", "content": "Then b."}]},
    ]  # fmt: skip
    assert run(tmp_path, tree, words=("--language", "de")) == []


def test_no_such_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "none.jsonl", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: none.jsonl: no such file")
