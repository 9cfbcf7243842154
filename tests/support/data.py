"""Data files, tokenizers and chat templates to read them with."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparseft.config import DatasetConfig
from sparseft.data.chat import Chats
from sparseft.data.encoding import Encoder
from sparseft.data.formats import Example, Plain
from sparseft.data.loading import LoadedData, load_datasets
from sparseft.data.records import Records

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


# Long runs that cross "\n", ":" and spaces, so that a trained tokenizer merges over the border of prompt and answer.
CORPUS = [
    "### Response:\nthe correct answer is true",
    "### Assistant: Hello there",
    "Answer: the end",
    "né à Zürich ☃",
] * 50


def make_tokenizer(style: str = "bytes", *, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """`bytes`: byte-level BPE whose merges may cross any border. `prepend`, `metaspace`, `prefix_space`: the three
    ways in which tokenizers put a space before a text. `bos`: whether a text gets BOS by default."""
    special = [BOS, EOS, PAD]
    if style in ("bytes", "prefix_space"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=style == "prefix_space", use_regex=style == "prefix_space"
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=PAD))
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = ["▁", *(chr(code) for code in range(33, 127))]
        if style == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS if eos else None, pad_token=PAD if eos else None
    )


def labelled(tokenizer: Any, item: dict[str, list[int]]) -> str:
    """The text under the loss."""
    return tokenizer.decode([label for label in item["labels"] if label != -100])


def write(path: Path, records: Any) -> str:
    """A JSON array for `.json`, JSON lines for `.jsonl`, else the text itself."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        path.write_text(records, encoding="utf-8")
    return str(path)


def load(path: str | None, tokenizer: Any, *, max_length: int = 512, seed: int = 0, **settings: Any) -> LoadedData:
    config = DatasetConfig(train_path=path, **{"eval_fraction": 0.0, **settings})
    with tempfile.TemporaryDirectory() as cache:
        return load_datasets(config, tokenizer, max_length=max_length, seed=seed, bundled=False, cache_dir=cache)


def records_of(*items: dict[str, Any]) -> Records:
    return Records(list(items), "set.jsonl", "line", list(range(1, len(items) + 1)))


def convert(records: Records, format: str) -> list[Example]:
    return Plain(format).convert(records)


def convert_messages(records: Records, tokenizer: Any) -> tuple[list[Example], str]:
    """The examples of chats, and what is said of them."""
    chats = Chats(Encoder(tokenizer))
    return chats.convert(records), chats.note(records.source)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Keeps the reasoning of the last turn only, as reasoning models' templates do.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")


UNMARKED = "{{ messages[-1].content }}"


_PEAKS = """
import resource, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from sparseft.config import DatasetConfig
from sparseft.data.loading import load_datasets
import pyarrow.parquet

words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
def load(path):
    config = DatasetConfig(train_path=path)
    return load_datasets(config, tokenizer, max_length=512, seed=0, bundled=False, cache_dir=sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measured = 3 + int(sys.argv[2])
for small in sys.argv[3:measured]:
    load(small)
for large in sys.argv[measured:]:
    before = peak()
    tokens = load(large).train.num_tokens
    print(large, peak() - before, tokens)
"""


def peaks(cache: Path, small: list[Path], large: list[Path]) -> list[tuple[str, int, int]]:
    """Of each of `large`, loaded one after another in a process of their own, its name, by how many KiB the peak of
    memory grew, and its tokens. `small` come first: what does not depend on the file is loaded then."""
    command = [sys.executable, "-c", _PEAKS, str(cache), str(len(small)), *map(str, [*small, *large])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(name, int(kibibytes), int(tokens)) for name, kibibytes, tokens in rows]
