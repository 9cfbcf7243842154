"""What is compared on two devices: `python elsewhere_worker.py cpu|elsewhere FOLDER` runs it all on one of them.

Writes FOLDER/found.json: for each case the numbers that came of it, or what went wrong.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAR = len(sys.argv) > 1 and sys.argv[1] == "elsewhere"
if FAR:  # before sparseft is imported, whose modules take these by name
    import elsewhere
    import transformers
    from accelerate.state import PartialState

    import sparseft.models.loading
    import sparseft.models.packed.quantized

    on = {"auto": elsewhere.DEVICE, "cpu": torch.device("cpu")}
    sparseft.models.loading.resolve_device = on.__getitem__
    # to sparseft a class of its own is a tensor that packs its numbers
    sparseft.models.packed.quantized.is_dtensor = lambda tensor: isinstance(tensor, elsewhere.Elsewhere)
    transformers.TrainingArguments.device = property(lambda self: elsewhere.DEVICE)
    PartialState.set_device = lambda self: setattr(self, "device", elsewhere.DEVICE)

import sparseft  # noqa: E402
import sparseft.training.rate  # noqa: E402
import sparseft.trim.job  # noqa: E402
from sparseft.cli.app import main  # noqa: E402
from sparseft.config import BUNDLED_ROOT  # noqa: E402
from sparseft.training.optimizer import SparseAdamW  # noqa: E402
from support.experts import build as build_experts  # noqa: E402
from support.models import build_model  # noqa: E402
from support.nf4 import quantize  # noqa: E402
from support.pages import blank_pages  # noqa: E402
from support.running import write_data  # noqa: E402

FOLDER = Path()
DEVICE: Any = elsewhere.DEVICE if FAR else "cpu"
TOKENS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def batch() -> dict[str, Tensor]:
    tokens = TOKENS.to(DEVICE)
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def new_folder() -> Path:
    folder = FOLDER / str(len(list(FOLDER.iterdir())))
    folder.mkdir()
    return folder


def steps(model: nn.Module, count: int = 2) -> list[float]:
    """The loss before each step and after the last."""
    optimizer = SparseAdamW(sparseft.trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [*losses, model(**batch()).loss.item()]


# -- by the Python interface ------------------------------------------------------------------------------------------


def placed(model: nn.Module) -> nn.Module:
    return model.to(DEVICE)


def adapters(config: Any, kind: str = "llama", model: nn.Module | None = None) -> list[float]:
    """Trained, saved, switched off and on, loaded beside itself, added up, and gone again."""
    model = placed(build_model(kind) if model is None else model)
    model = sparseft.attach(model, config, chosen(model, config))
    found = steps(model)
    folder = new_folder()
    sparseft.save_adapter(model, folder)
    sparseft.set_adapter(model, None)
    found.append(model(**batch()).loss.item())
    model = sparseft.load_adapter(model, folder, name="again")
    found.append(model(**batch()).loss.item())
    sparseft.fuse(model, {"again": 0.5, "default": 0.25}, name="both")
    found.append(model(**batch()).loss.item())
    return [*found, sparseft.detach(model)(**batch()).loss.item()]


def packed() -> nn.Module:
    return quantize(build_model("llama"))


def chosen(model: nn.Module, config: Any) -> Any:
    if config.importance in ("random", "weight"):
        return None
    return sparseft.compute_selection(model, config, [batch()])


def moved() -> list[float]:
    """Trained, to the CPU and back, and trained on."""
    model = placed(build_model("llama"))
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.9, importance="random"))
    found = steps(model)
    model = placed(model.to("cpu"))
    return [*found, *steps(model)]


def merged() -> list[float]:
    model = placed(build_model("qwen2"))
    sparseft.attach(model, sparseft.SylvaConfig(sparsity=0.8, block_size=8, importance="weight"))
    return [*steps(model), sparseft.merge(model)(**batch()).loss.item()]


def left_behind() -> list[float]:
    """What this is for: elsewhere a step is refused whose input is on the CPU."""
    model = placed(build_model("llama"))
    sparseft.attach(model, sparseft.S2FTConfig(sparsity=0.9, importance="random"))
    try:
        model(input_ids=TOKENS)
    except RuntimeError as error:
        return [float(FAR and type(error).__name__ == "TwoDevices")]
    return [float(not FAR)]


S2FT, SYLVA = sparseft.S2FTConfig, sparseft.SylvaConfig
BY_PYTHON: dict[str, Callable[[], list[float]]] = {
    "columns": lambda: adapters(S2FT(sparsity=0.9, importance="random")),
    "rows and columns": lambda: adapters(S2FT(q_ratio=0.2, o_ratio=0.2, u_ratio=0.1, d_ratio=0.1, importance="weight")),
    "permuted": lambda: adapters(S2FT(sparsity=0.9, importance="activation", layout="permuted")),
    "transposed": lambda: adapters(S2FT(sparsity=0.9, importance="product"), "gpt2"),
    "blocks": lambda: adapters(SYLVA(sparsity=0.8, block_size=8)),
    "blocks by Fisher, biases": lambda: adapters(SYLVA(sparsity=0.8, block_size=4, importance="fisher"), "qwen2"),
    "grid": lambda: adapters(sparseft.LosiaConfig(sparsity=0.8)),
    "experts": lambda: adapters(S2FT(sparsity=0.9, importance="gradient"), model=build_experts("mixtral")),
    "beside a packed base": lambda: adapters(SYLVA(sparsity=0.8, block_size=8), model=packed()),
    "columns beside one": lambda: adapters(S2FT(sparsity=0.9, importance="random"), model=packed()),
    "moved": moved,
    "merged": merged,
    "left behind": left_behind,
}

# -- by command -------------------------------------------------------------------------------------------------------

# On few examples: evaluating them before and after takes longer than the steps. A page reads files alone.
SHORT = [
    "model.dtype=float32", "trainer.max_steps=3", "trainer.batch_size=2", "trainer.gradient_accumulation=1",
    "trainer.max_length=96", "overwrite=true", "dataset.eval_fraction=0.2",
]  # fmt: skip
SUMS, PAIRS = ("dataset=json", "dataset.train_path=pairs.jsonl"), ("dataset.train_path=preferences.jsonl",)
BY_COMMAND = {
    "s2ft, checkpointing": "method=s2ft method.importance=gradient method.num_samples=4 trainer.checkpointing=full",
    "sylva, selective": "method=sylva method.num_samples=4 trainer.checkpointing=selective trainer.label_smoothing=0.1",
    "losia, averaged": "method=losia trainer.average=last:0.5",
    "lora, packing": "method=lora dataset.packing=true trainer.max_length=128",
    "full": "method=full trainer.average=ema:0.5 trainer.eval_steps=2",
    "re-selection, budget": "method=s2ft method.reselect_steps=1 method.order=sampled"
    " trainer.forget_budget=0.01 trainer.forget_source=bundled:data/text/train.txt",
    "re-selection by calibration": "method=sylva method.reselect_steps=1 method.num_samples=4",
    "dpo": "method=s2ft objective=dpo trainer.max_length=64",
}


def prepare() -> None:
    """The data of the commands, in the working directory."""
    write_data(Path(), 20)
    lines = (BUNDLED_ROOT / "data/preference/train.jsonl").read_text().splitlines(keepends=True)
    Path("preferences.jsonl").write_text("".join(lines[:10]))


def run_command(*words: str) -> None:
    assert (code := main([*words])) == 0, f"{words}: exit code {code}"


def trained(overrides: str) -> list[float]:
    run = new_folder()
    data = PAIRS if "objective=dpo" in overrides else SUMS
    run_command("train", *SHORT, *data, *overrides.split(), f"output_dir={run}", f"cache_dir={FOLDER / 'cache'}")
    summary = json.loads((run / "summary.json").read_text())
    assert FAR == json.loads((run / "environment.json").read_text())["device"].startswith("elsewhere")
    return [summary[name] for name in ("eval_loss_before", "train_loss", "eval_loss_after")]


def afterwards() -> list[float]:
    """A run that goes on from a checkpoint, with a rate that it looked for; asked, and exported."""
    run, out = new_folder(), new_folder()
    words = [*SHORT, *SUMS, "method=s2ft", "trainer.save_steps=2", f"output_dir={run}", f"cache_dir={FOLDER / 'cache'}"]
    run_command("train", *words, "trainer.learning_rate=auto")
    for name in ("summary.json", "adapter/adapter_model.safetensors"):  # as after a kill
        (run / name).unlink()
    (run / "checkpoints" / "checkpoint-3").rename(FOLDER / "gone")
    words[words.index("overwrite=true")] = "trainer.resume=auto"
    run_command("train", *words, "trainer.learning_rate=auto")
    run_command("eval", "boolq", "--run", str(run), "--limit", "2", "eval.max_new_tokens=4")
    run_command("export", str(run), "--format", "merged", "--out", str(out))
    asked = json.loads((run / "eval" / "boolq.json").read_text())["results"]["boolq"]
    accuracy = next(value for name, value in asked.items() if name.startswith("acc"))
    summary = json.loads((run / "summary.json").read_text())
    return [summary["train_loss"], summary["eval_loss_after"], accuracy]


CASES = BY_PYTHON | {name: functools.partial(trained, words) for name, words in BY_COMMAND.items()}
CASES["afterwards"] = afterwards

if __name__ == "__main__":
    FOLDER = Path(sys.argv[2])
    sparseft.trim.job.HELD_OUT = 16
    sparseft.training.rate.STEPS, sparseft.training.rate.WATCHED = 12, (4, 4)  # two rates a decade
    found: dict[str, Any] = {}
    prepare()
    with blank_pages():
        for name in sys.argv[3:] or CASES:
            try:
                found[name] = CASES[name]()
            except BaseException:
                found[name] = traceback.format_exc()
    (FOLDER / "found.json").write_text(json.dumps(found))
