#!/usr/bin/env python3
"""The tokens that scripts/graph_fronts.py trains on and reads losses on, as one file.

    python scripts/front_tokens.py --model MODEL --data DATA --out tokens.npz

DATA: a folder with `arithmetic/gsm8k`, `commonsense/*`, `oasst1` and `text` as LLM-Adapters, OASST1 and TinyStories
have them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sparseft import console
from sparseft.bench.forgetting import SPLITS
from sparseft.config import DatasetConfig, ModelConfig
from sparseft.data.loading import load_datasets
from sparseft.data.tokenized import IGNORED
from sparseft.models.loading import load_tokenizer

LENGTHS = {"gsm8k": 256, "commonsense": 160, "oasst1": 256}  # tokens of a training row
TRAINED_SETS = ("ARC-Challenge", "ARC-Easy", "boolq")  # of commonsense; piqa is a source's, two are touched by nothing
UNTOUCHED_SETS = ("openbookqa", "winogrande")
SOURCE_ROWS, HELD_OUT_ROWS, QUESTIONS = 256, 500, 500


def tokens(model: str, data: Path, out: Path) -> None:
    """Writes of each set `ids` (uint16) and `labelled` of all its rows, and their `lengths`."""
    tokenizer = load_tokenizer(ModelConfig(path=model))
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch, console.quiet():

        def load(path: Path | list[dict[str, Any]], name: str, length: int, held_out: float = 0.0) -> Any:
            if isinstance(path, list):
                content, path = path, Path(scratch) / f"{len(found)}.json"
                path.write_text(json.dumps(content))
            config = DatasetConfig(name=name, train_path=str(path), eval_fraction=held_out)
            data = load_datasets(
                config, tokenizer, max_length=length, seed=0, bundled=False, cache_dir=Path(scratch) / "cache"
            )
            return (data.train, data.eval) if held_out else data.train

        def put(name: str, rows: list[Any]) -> None:
            labels = [np.asarray(row["labels"]) for row in rows]
            found[f"{name}.ids"] = np.concatenate([np.asarray(row["input_ids"], np.uint16) for row in rows])
            found[f"{name}.labelled"] = np.concatenate([each != IGNORED for each in labels])
            found[f"{name}.lengths"] = np.array([len(each) for each in labels], np.int32)

        def put_split(name: str, halves: Any, most: int) -> None:
            for split, examples in zip(SPLITS, halves, strict=True):
                few = random.Random(0).sample(range(len(examples)), min(most // 2, len(examples)))
                put(f"{name}.{split}", [examples[at] for at in few])

        def put_training(name: str, examples: Any, held_out: tuple[Any, Any]) -> None:
            longest = LENGTHS[name] if name != "oasst1" else 10**9  # conversations are cut, answers are not
            put(f"{name}.train", [row for row in map(examples.__getitem__, range(len(examples)))
                                  if len(row["input_ids"]) <= longest])  # fmt: skip
            put_split(name, held_out, HELD_OUT_ROWS)

        # Held out from where training comes from: answers of gsm8k's test file are written in another style.
        problems = records(data / "arithmetic/gsm8k/train.json")
        put_training("gsm8k", load(problems[500:3500], "arithmetic", 256), load(problems[:500], "arithmetic", 256, 0.5))
        questions = [each for name in TRAINED_SETS for each in records(data / f"commonsense/{name}/train.json")[:1100]]
        asked = [each for name in TRAINED_SETS for each in records(data / f"commonsense/{name}/test.json")[:200]]
        put_training("commonsense", load(questions, "commonsense", 256), load(asked, "commonsense", 256, 0.5))
        chats = [json.loads(line) for line in (data / "oasst1/trees100_guanaco_style_train.jsonl").open()]
        random.Random(0).shuffle(chats)
        # Conversations of one tree begin with the same turns, so whole trees are held out.
        trees = sorted({root(chat) for chat in chats})
        apart = set(random.Random(0).sample(trees, len(trees) // 4))
        sides = [[chat for chat in chats if (root(chat) in apart) == held_out] for held_out in (False, True)]
        put_training("oasst1", load(sides[0], "oasst1", 384), load(sides[1], "oasst1", 384, 0.5))
        put_split("stories", load(data / "text/tinystories.txt", "text", 128, 0.5), SOURCE_ROWS)
        replies = data / "oasst1/openassistant_best_replies_eval.jsonl"
        put_split("chat", load(replies, "oasst1", 256, 0.5), SOURCE_ROWS)
        problems = records(data / "arithmetic/gsm8k/test.json")
        put_split("maths", load(problems, "arithmetic", 256, 0.5), SOURCE_ROWS)
        for name, sets in (("asked", TRAINED_SETS), ("untouched", UNTOUCHED_SETS)):
            answers, of = [], []
            for each in (each for one in sets for each in records(data / f"commonsense/{one}/test.json")[-250:]):
                options = each["instruction"].rsplit("Answer format:", 1)[1].strip().split("/")
                answers += [{**each, "output": f"the correct answer is {option}"} for option in options]
                of.append((len(options), options.index(each["answer"])))
            examples = load(answers, "commonsense", 400)
            put(name, [examples[at] for at in range(len(answers))])
            found[f"{name}.of"] = np.array(of, np.int32)
        rows, of = [], []
        for each in records(data / "commonsense/piqa/test.json")[:QUESTIONS]:  # as lm-eval asks it
            goal, rest = each["instruction"].split(": ", 1)[1].split("\n\nSolution1: ", 1)
            solutions = rest.rsplit("\n\nAnswer format:", 1)[0].split("\n\nSolution2: ", 1)
            asks = f"Question: {goal}\nAnswer:"
            before = len(tokenizer(asks, add_special_tokens=False)["input_ids"])
            for solution in solutions:
                ids = tokenizer(f"{asks} {solution}", add_special_tokens=False)["input_ids"]
                rows.append({"input_ids": ids, "labels": [IGNORED] * before + ids[before:]})
            of.append((2, int(each["answer"] == "solution2")))
        put("piqa", rows)
        found["piqa.of"] = np.array(of, np.int32)
    with out.open("wb") as file:
        np.savez_compressed(file, **found)


def root(chat: dict[str, Any]) -> str:
    """The first turn of a conversation."""
    return str(chat["text"].split("### Assistant:")[0].strip())


def records(path: Path) -> list[dict[str, Any]]:
    """Those that have an answer, in an order of their own."""
    found = [each for each in json.loads(path.read_text()) if each["output"].strip()]
    random.Random(0).shuffle(found)
    return found


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    tokens(options.model, options.data, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
