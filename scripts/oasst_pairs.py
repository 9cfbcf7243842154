#!/usr/bin/env python3
"""OpenAssistant's message trees -> pairs for preference tuning: the best- and the worst-ranked reply to a prompt.

    python scripts/oasst_pairs.py trees.jsonl pairs.jsonl [--language en]

A line is {"prompt": [message, …], "chosen": [message], "rejected": [message]}, chats as TRL's trainers take them. Pairs
of one tree stand together, so that a part held out at either end shares no prompt with the rest but one tree's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROLES = {"prompter": "user", "assistant": "assistant"}


def pairs_of(tree: dict[str, Any], language: str | None) -> Iterator[dict[str, Any]]:
    """The pairs of one tree, from its first message down."""
    waiting: list[tuple[list[dict[str, str]], dict[str, Any]]] = [([], tree["prompt"])]
    while waiting:
        before, message = waiting.pop()
        if message.get("deleted") or (language is not None and message.get("lang") != language):
            continue
        chat = [*before, {"role": ROLES[message["role"]], "content": message["text"]}]
        replies = message.get("replies", [])
        if message["role"] == "prompter":
            ranked = [r for r in replies if r.get("rank") is not None and not r.get("deleted")]
            best, worst = (pick(ranked, key=lambda r: r["rank"], default=None) for pick in (min, max))
            if best is not None and best["rank"] < worst["rank"] and best["text"] != worst["text"]:
                chosen, rejected = ([{"role": "assistant", "content": r["text"]}] for r in (best, worst))
                yield {"prompt": chat, "chosen": chosen, "rejected": rejected}
        waiting += [(chat, reply) for reply in reversed(replies)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--language", default=None, help="of messages that are taken, as en (all)")
    given = parser.parse_args()
    if not given.trees.is_file():
        print(f"error: {given.trees}: no such file: expected message trees, one a line.", file=sys.stderr)
        return 2
    trees = [json.loads(line) for line in given.trees.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [pair for tree in trees for pair in pairs_of(tree, given.language)]
    given.pairs.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{given.pairs}: {len(pairs)} pairs of {len(trees)} trees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
