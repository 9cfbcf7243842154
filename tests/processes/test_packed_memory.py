"""A packed base is never in memory twice, nor at full precision: the commands run in less memory than the plain model.

A Llama with LLaMA-3 70B's proportions at a sixteenth of its width, of 24 layers. Its vocabulary is cut, so that the
linears of its layers are nearly all of it. It is stored in fp16 and computes in bf16: weights that are stored in the
dtype a CPU computes in are mapped from their files and take no memory of their own, which they do on any accelerator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from safetensors.torch import save_file

from support.models import build_tokenizer
from support.running import write_data

LAYERS = 24
WIDTH, INNER, HEADS = 512, 1792, 8  # 8192, 28672 and 64 over sixteen and eight; heads for keys an eighth of those
DENSE = 2 * LAYERS * (WIDTH * WIDTH * 9 // 4 + 3 * WIDTH * INNER)  # bytes of the layers' linears in 16 bits
ALLOWED = 0.8  # of DENSE, above what the same command takes on a model of one layer
PACKED = DENSE // 2  # in int8, the scales of rows aside: NF4 takes a CPU minutes to pack

# The command in a machine that has no more memory than `limit`, as far as it can see (0: in this one).
COMMAND = """
import os, sys, psutil
limit, page = int(sys.argv[1]), os.sysconf("SC_PAGE_SIZE")
if limit:
    whole = psutil.virtual_memory
    def left():
        mine = psutil.Process().memory_info()
        return whole()._replace(available=max(0, limit - (mine.rss - mine.shared)))
    psutil.virtual_memory = left
from sparseft.cli.app import main
sys.exit(main(sys.argv[2:]))
"""

# Merging as it is usually done.
MERGE = """
import sys, sparseft
from sparseft.config import ModelConfig
from sparseft.models.loading import load_model
_, base, adapter, out = sys.argv[1:]
model = load_model(ModelConfig(path=base, dtype="bfloat16"))
sparseft.merge(sparseft.load_adapter(model, adapter)).save_pretrained(out)
"""


@dataclass
class Watched:
    peak: int  # bytes of anonymous memory: what no file holds
    killed: bool  # as it passed its limit
    code: int
    err: str


def watched(folder: Path, program: str, *words: str, limit: int = 0) -> Watched:
    """A program in a process of its own, which is killed once it holds more than `limit` bytes (0: never).

    malloc hands back what is freed at once, from sizes on that every weight has: as it does with a 70B model's.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peak, killed = 0, False
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", program, str(limit), *words], cwd=folder, env=env,
                                   stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            while process.poll() is None:
                peak = max(peak, sum(map(anonymous, [process.pid, *children(process.pid)])))
                if limit and peak > limit:
                    killed = True
                    break
                time.sleep(0.02)
        finally:
            process.kill()
        code = process.wait()
        log.seek(0)
        return Watched(peak, killed, code, log.read())


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def checkpoint(folder: Path, layers: int) -> Path:
    """A model folder, written a decoder layer at a time."""
    tokenizer = build_tokenizer()
    content = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 8, max_position_embeddings=128, dtype="float16",
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    content.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = dict(transformers.AutoModelForCausalLM.from_config(content).named_parameters())
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in files.items():
        values = {name: 0.03 * torch.randn(shapes[name].shape, generator=generator) for name in names}
        values = {name: (value if value.dim() == 2 else 1 + value).half() for name, value in values.items()}
        save_file(values, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which says what a process holds")
def test_every_command_fits_where_the_plain_model_does_not(tmp_path: Path) -> None:
    """Prints what docs/quantized.md says: pytest -s -m slow tests/processes/test_packed_memory.py"""
    pytest.importorskip("torchao")
    data = write_data(tmp_path)["json"]
    common = [
        "model.dtype=bfloat16", "dataset=json", f"dataset.train_path={data}", "dataset.max_examples=12", "hardware=cpu",
        "method=s2ft", "method.d_ratio=0.03", "method.importance=sylva", "method.num_samples=3",
        "trainer.max_length=64", "trainer.warmup_steps=0", "trainer.learning_rate=1e-2",
    ]  # fmt: skip
    steps = ["trainer.max_steps=2", "trainer.gradient_accumulation=1", "output_dir=run"]
    base: dict[str, int] = {}
    for layers in (1, LAYERS):
        folder = tmp_path / str(layers)
        model = checkpoint(folder / "base", layers)
        words = [f"model.path={model}", *common]
        for name, command in {
            "preprocess": ["preprocess", *words, "model.quantize=int8"],
            "train": ["train", *words, "model.quantize=int8", *steps],
            "export": ["export", "run", "--format", "merged", "--out", "out", "hardware=cpu"],
        }.items():
            limit = 0 if layers == 1 else int(base[name] + ALLOWED * DENSE)
            done = watched(folder, COMMAND, *command, limit=limit)
            assert done.code == 0, (name, layers, done.peak, limit, done.err)
            if layers == 1:
                base[name] = done.peak
                continue
            if name == "preprocess":
                assert "calibration: layer by layer" in done.err
            above = done.peak - base[name]
            plain = {
                "preprocess": [COMMAND, "preprocess", *words, "cache_dir=plain"],
                "train": [COMMAND, "train", *words, *steps, "output_dir=plain-run"],
                "export": [MERGE, str(model), "run/adapter", "plain"],
            }[name]
            dense = watched(folder, *plain, limit=limit)
            print(f"{name}: {above / 2**20:.0f} MiB above {base[name] / 2**20:.0f}, {above / PACKED:.2f} of the packed "
                  f"linears; allowed {ALLOWED * DENSE / 2**20:.0f}, the plain model was killed at "
                  f"{(dense.peak - base[name]) / 2**20:.0f}")  # fmt: skip
            assert dense.killed, (name, dense)
