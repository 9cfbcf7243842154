"""`sparseft data [PATH]`: what would be learnt from a file, before anything is trained."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from sparseft import console
from sparseft.config import RunConfig
from sparseft.data.loading import check_tokens, data_of
from sparseft.data.preview import preview
from sparseft.models.loading import load_config, load_tokenizer
from sparseft.training import checks

EXAMPLES = 3
LONGEST = 3000  # characters of a part that are printed
BAR = 30  # columns
MARKS = ("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}")


def run(config: RunConfig, examples: int = EXAMPLES) -> dict[str, Any]:
    """Reads and tokenises what `train` would with this configuration, and returns what there is to say of it.

    examples: so many are shown. The tokens are cached, and `train` takes them up; no weights are loaded. Raises
    UserError where the data are missing, cannot be read, or hold nothing that would be trained.
    """
    console.clear_warnings()
    checks.check_data(config)
    checks.check_model(config)
    tokenizer = load_tokenizer(config.model)
    data = data_of(config, tokenizer)
    data.tell()
    rows = load_config(config.model, packed=True).get_text_config().vocab_size
    check_tokens(data, tokenizer, rows, rows)
    return preview(data, tokenizer, config, examples) | {"tokenizer": config.model.tokenizer or config.model.path}


def render(result: dict[str, Any]) -> None:
    """The examples, then the numbers, so that these are what is seen last."""
    numbers: Counter[str] = Counter()
    for example in result["shown"]:
        what = f"{example['answer']} answer" if "answer" in example else "example"
        numbers[what] += 1
        print(f"--- {what} {numbers[what]}: {example['tokens']:,} tokens, {example['learnt_tokens']:,} of them learnt")
        _print_parts([(part["text"], part["learnt"]) for part in example["parts"]])
    if result["shown"]:
        how = "in green" if console.is_terminal(sys.stdout) else f"between {_marks()[0]} and {_marks()[1]}"
        print(f"--- what is learnt stands {how}\n")
    _print_lengths(result)
    share = result["learnt_tokens"] / result["tokens"]
    said = {
        "from": f"{result['source']}, format {result['format']}",
        "template": result["template"],
        "tokenizer": result["tokenizer"],
        "examples": f"{result['examples']:,} to train on, {result['eval_examples']:,} held out",
        "tokens": f"{result['tokens']:,}, of which {result['learnt_tokens']:,} ({share:.0%}) are learnt",
        "cut": f"{result['cut']:,} answers end at trainer.max_length={result['max_length']}",
        "left out": f"{result['dropped']:,} without a token to learn in so many",
        "duplicates": f"{result['duplicates']:,} examples say what an earlier one says, token for token",
    }
    if result["repeated"]:
        said["repeated"] = f"{result['repeated']:,} examples taken again, for the shares of their sets"
    for name, text in said.items():
        print(f"{name:<11}{text}")


def _print_parts(parts: list[tuple[str, bool]]) -> None:
    """An example's text; what is learnt in colour on a terminal, else between marks."""
    texts = [(console.visible(_shortened(text)), learnt) for text, learnt in parts]
    if console.is_terminal(sys.stdout):
        from rich.console import Console
        from rich.text import Text

        styled = ((text, "bold green" if learnt else "dim") for text, learnt in texts)
        Console(highlight=False).print(Text.assemble(*styled))
        return
    begins, ends = _marks()
    print("".join(f"{begins}{text}{ends}" if learnt else text for text, learnt in texts))


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} […] {text[-half:]}"


def _marks() -> tuple[str, str]:
    return MARKS if _takes(MARKS[0]) else ("[[", "]]")


def _takes(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _print_lengths(result: dict[str, Any]) -> None:
    block = "█" if _takes("█") else "#"
    most = max(row["examples"] for row in result["histogram"])
    found = result["lengths"]
    console.table(
        f"Tokens of an example: {found['min']} to {found['max']}, median {found['median']}, mean {found['mean']:.0f}, "
        f"95 % up to {found['p95']}",
        ["tokens", "examples", ""],
        [
            [f"{row['from']}-{row['to']}", row["examples"], block * -(-BAR * row["examples"] // most)]
            for row in result["histogram"]
        ],
    )
    print()
