"""Files that anybody may have written: every loader refuses what is broken or altered in one sentence (`UserError`),
takes no memory for what a file only claims, and never gives back something else than what was saved.

40 cases a loader here, 800 with `make test-slow`; SPARSEFT_FUZZ=1 draws others each time.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sparseft
from sparseft import SylvaConfig, compute_selection
from sparseft.adapters.description import CONFIG, TENSORS
from sparseft.compose.run_config import compose, to_yaml
from sparseft.config import DatasetConfig
from sparseft.errors import UserError, shown
from sparseft.files.hashing import BODY, HASHED, body_hash, file_hash
from sparseft.importance.calibration import CalibrationState
from sparseft.report.page import build_report
from sparseft.runs.metrics import read_metrics, truncate_metrics
from sparseft.selection.selection import Selection
from sparseft.training.best import read_best
from sparseft.training.checkpoints import check, read_state, write_manifest
from sparseft.training.trainer import train
from support.training import attached, examples, trainer_of

SLOW_CASES = 800  # a loader
SPARE = 1 << 30  # bytes of memory that a load may take
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 2**63, 1.5, 1e308, "", "x", "../../etc/passwd", "/etc/passwd",
    "model.layers.0.self_attn.q_proj", "__class__", "\ud800", "\x00", [], {}, [[]], [1, 2, 3], {"a": {"b": []}},
    "(a+)+$", "a" * 5000, [0] * 2000,
]  # fmt: skip
JUNK = [
    b"", b"\x00", b"\xff\xfe", b"\xc3", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 5000, b"[" * 100_000,
    b'{"a":' * 20_000, b"}", b'"', b",", b"\n", b"null", b"&a [*a, *a]", b"!!python/object/apply:os.system [true]",
    b"\xef\xbb\xbf", b"\xff\xff\xff\xff\xff\xff\xff\x7f", (1 << 40).to_bytes(8, "little"), b"../../../x", b"\r\n\t ",
]  # fmt: skip


@dataclass
class Loader:
    """A folder of good files, and what reads it."""

    folder: Path
    load: Callable[[Path], Any]  # its result says all that the files mean, and compares with ==
    exact: bool  # hashes protect the files: what is accepted must mean what was saved
    reseal: Callable[[Path], None] | None = None  # makes the hashes fit the altered files


def loaders(make_model: Any, tokenizer: Any, root: Path) -> dict[str, Callable[[], Loader]]:
    """By name; each is made when it is first asked for."""
    plain = make_model("llama")

    def loaded(folder: Path) -> Any:
        model = copy.deepcopy(plain)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            model = sparseft.load_adapter(model, folder)
        except UserError:  # whole or not at all
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            raise
        weights = sparseft.merge(model).state_dict()
        assert weights.keys() == before.keys()  # no name reaches outside of the model
        return {name: value.numpy().tobytes() for name, value in weights.items()}

    def reseal_adapter(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        save_file(load_file(folder / TENSORS), folder / TENSORS, {BODY: body_hash(content, HASHED)})
        (folder / CONFIG).write_text(json.dumps(content | {"sha256": file_hash(folder / TENSORS)}))

    def adapter(method: str, foreign: bool = False) -> Loader:
        model = attached(plain, method)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in sparseft.trainable_parameters(model).values():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        folder = root / f"adapter-{method}-{foreign}"
        sparseft.save_adapter(model, folder)
        if foreign:
            content = json.loads((folder / CONFIG).read_text())
            del content["sparseft"]
            (folder / CONFIG).write_text(json.dumps(content))
        (folder / "README.md").unlink(missing_ok=True)
        return Loader(folder, loaded, not foreign, None if method == "lora" else reseal_adapter)

    def selection() -> Loader:
        def load(folder: Path) -> Any:
            found = Selection.load(folder)
            indices = {name: {k: i.tolist() for k, i in kinds.items()} for name, kinds in found.modules.items()}
            return indices, found.block_size, found.meta

        made = compute_selection(plain, SylvaConfig(sparsity=0.9, block_size=8, importance="weight"))
        return Loader(made.save(root / "selection"), load, True)

    def whole_model() -> Loader:
        from sparseft.config import ModelConfig
        from sparseft.models.loading import load_model

        def load(folder: Path) -> Any:
            weights = load_model(ModelConfig(path=str(folder))).state_dict()
            return {name: value.numpy().tobytes() for name, value in weights.items()}

        folder = root / "whole-model"
        sparseft.save_adapter(attached(plain, "full"), folder)
        return Loader(folder, load, True)

    def checkpoint_folder() -> tuple[Any, Path]:
        run = root / "run-of-checkpoint"
        trainer = trainer_of(attached(plain, "s2ft"), run, examples(8), max_steps=2, save_steps=1)
        if not (run / "checkpoints" / "checkpoint-2").is_dir():
            train(trainer, None, 2)
        return trainer, run / "checkpoints" / "checkpoint-2"

    def checkpoint() -> Loader:
        def load(folder: Path) -> Any:
            check(folder)
            kept = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}

        return Loader(checkpoint_folder()[1], load, True)

    def sealed_checkpoint() -> Loader:
        trainer, folder = checkpoint_folder()

        def load(folder: Path) -> None:
            check(folder)
            read_state(folder)
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.create_optimizer_and_scheduler(2)
            with contextlib.redirect_stderr(io.StringIO()):
                trainer._load_from_checkpoint(str(folder))
            trainer._load_optimizer_and_scheduler(str(folder))
            trainer._load_rng_state(str(folder))

        def reseal(folder: Path) -> None:
            (folder / "manifest.json").unlink(missing_ok=True)
            write_manifest(folder)

        return Loader(folder, load, False, reseal)

    def partial() -> Loader:
        folder = root / "key.partial"
        tensors = {"a": torch.randn(5, 7), "b": torch.arange(6), "c": torch.randn(3, dtype=torch.float64)}
        CalibrationState(folder, ["key"]).save("statistics", tensors, {"done": [2, 3], "statistics": {"x": [1.5]}})

        def load(folder: Path) -> Any:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                found = CalibrationState(folder, ["key"]).load("statistics")
            if found is None:
                there = [path for path in folder.glob("statistics*") if path.is_file()]
                assert not there or "starts anew" in said.getvalue()
                raise UserError("calibration starts anew")
            return {name: (t.dtype, t.tolist()) for name, t in found[0].items()}, found[1]

        return Loader(folder, load, True)

    def run() -> Loader:
        folder = root / "run"
        (folder / "eval").mkdir(parents=True)
        composed = compose("train", [])
        (folder / "config.yaml").write_text(to_yaml(composed))
        lines = [{"step": s, "loss": 2.0 / s, "learning_rate": 1e-3, "grad_norm": 1.0} for s in (1, 2)]
        lines.append({"step": 2, "eval_loss": 1.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {"method": "sylva", "model": "m", "dataset": "d", "steps": 2, "trainable_parameters": 5,
                   "total_parameters": 50, "eval_loss_before": 2.0, "eval_loss_after": 1.0, "warnings": ["w"],
                   "train_seconds": 1.0, "method_config": {"block_size": 4}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2"}, "commit": "abc-dirty"}))
        result = {"task": "mmlu", "tasks": {"mmlu": {"accuracy": 0.5, "stderr": 0.1, "samples": 4, "shots": 5}},
                  "sparseft": {"warnings": ["w"]}}  # fmt: skip
        (folder / "eval" / "mmlu.json").write_text(json.dumps(result))
        described = {"modules": {"m": {"shape": [4, 8], "blocks": 1}}, "block_size": 4, "method": "sylva"}
        (folder / "selection").mkdir()
        (folder / "selection" / "selection.json").write_text(json.dumps(described))
        shutil.copytree(adapter("sylva").folder, folder / "adapter")
        (folder / "checkpoints" / ".best").mkdir(parents=True)
        (folder / "checkpoints" / ".best" / "best.json").write_text('{"step": 2, "eval_loss": 1.0, "eval_score": null}')

        def load(folder: Path) -> None:
            from sparseft.evaluation.target import find_target
            from sparseft.training.best import evaluations
            from sparseft.training.resume import previous_run

            config = copy.deepcopy(composed)
            config.output_dir, config.trainer.resume = str(folder), "auto"
            build_report([folder], folder / "report.html")  # says in the page what it could not read
            problems = []

            def continued() -> None:
                try:
                    previous_run(config)
                except UserError as error:
                    if "has finished, and left no checkpoint" not in str(error):
                        raise

            for read in (
                lambda: find_target(config, run=str(folder), adapter=None, base=False),
                continued,
                lambda: read_best(folder / "checkpoints"),
                lambda: evaluations(folder, range(2, 3)),
                lambda: truncate_metrics(folder / "metrics.jsonl", 1),
                lambda: read_metrics(folder / "metrics.jsonl"),
            ):
                try:
                    read()
                except UserError as error:
                    problems.append(error)
            if problems:
                raise problems[0]

        return Loader(folder, load, False)

    def data(kind: str) -> Loader:
        import pyarrow
        import pyarrow.parquet

        folder = root / f"data-{kind}"
        folder.mkdir()
        name = {"json": "train.json", "jsonl": "train.jsonl", "parquet": "train.parquet", "text": "train.txt"}[kind]
        records = [{"prompt": f"{a} + {b} =", "completion": str(a + b)} for a in range(5) for b in range(5)]
        if kind == "json":
            (folder / "train.json").write_text(json.dumps(records))
        elif kind == "jsonl":
            chat = [{"messages": [{"role": "user", "content": r["prompt"]},
                                  {"role": "assistant", "content": r["completion"]}]} for r in records]  # fmt: skip
            (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "train.parquet")
        else:
            (folder / "train.txt").write_text("\n\n".join(f"{r['prompt']} {r['completion']}" for r in records))

        def load(folder: Path) -> None:
            from sparseft.data.loading import load_datasets
            from sparseft.evaluation.llm_adapters import read_records

            file = folder / name
            if kind == "json":
                with contextlib.suppress(UserError):
                    read_records(file, "boolq")
            config = DatasetConfig(name="json", train_path=str(file))
            with tempfile.TemporaryDirectory() as cache:
                load_datasets(config, tokenizer, max_length=64, seed=0, bundled=False, cache_dir=cache)

        return Loader(folder, load, False)

    return {
        "s2ft adapter": lambda: adapter("s2ft"),
        "sylva adapter": lambda: adapter("sylva"),
        "lora adapter": lambda: adapter("lora"),
        "peft's own adapter": lambda: adapter("lora", True),
        "fully trained model": whole_model,
        "selection": selection,
        "checkpoint": checkpoint,
        "checkpoint sealed again": sealed_checkpoint,
        "unfinished calibration": partial,
        "run": run,
        "data: JSON": lambda: data("json"),
        "data: JSON lines": lambda: data("jsonl"),
        "data: parquet": lambda: data("parquet"),
        "data: text": lambda: data("text"),
    }


NAMES = (
    "s2ft adapter,sylva adapter,lora adapter,peft's own adapter,fully trained model,selection,checkpoint,"
    "checkpoint sealed again,unfinished calibration,run,data: JSON,data: JSON lines,data: parquet,data: text"
).split(",")


@pytest.fixture(scope="module")
def made(make_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loader]:
    makers = loaders(make_model, tokenizer, tmp_path_factory.mktemp("fuzz"))
    assert list(makers) == NAMES
    done: dict[str, Loader] = {}
    return lambda name: done.setdefault(name, done.get(name) or makers[name]())


# ---- what is done to a file ----


def alter_bytes(draw: Any, path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if draw(st.booleans()):  # beginnings hold what decides how the rest is read
        at %= 64
    at = min(at, max(0, len(content) - 1))
    what = draw(st.sampled_from(["flip", "cut", "junk", "over", "remove", "repeat", "start"]))
    if what == "flip" and content:
        content[at] ^= 1 << draw(st.integers(0, 7))
    elif what == "cut":
        del content[at:]
    elif what == "junk":
        content[at:at] = draw(st.sampled_from(JUNK))
    elif what == "over":
        junk = draw(st.sampled_from(JUNK))[:64]
        content[at : at + len(junk)] = junk
    elif what == "remove":
        del content[at : at + draw(st.integers(1, 40))]
    elif what == "repeat":
        content[at:at] = content[at : at + draw(st.integers(1, 200))]
    elif what == "start":
        content[:8] = draw(st.sampled_from([0, 1, 99, 10**6, 1 << 32, 1 << 62, 2**64 - 1])).to_bytes(8, "little")
    path.write_bytes(content)


def alter_value(draw: Any, value: Any, depth: int = 0) -> Any:
    """One entry somewhere inside is another, gone, or one more."""
    if isinstance(value, (dict, list)) and value and depth < 6 and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        changed = copy.copy(value)
        how = draw(st.integers(0, 5))
        if how == 0:
            del changed[key]
        elif how == 1 and isinstance(value, dict):
            changed[draw(st.sampled_from(["x", "../x", "model", "__init__", ""]))] = draw(st.sampled_from(HOSTILE))
        elif how == 2 and isinstance(value, list):
            changed.append(value[key])
        else:
            changed[key] = alter_value(draw, value[key], depth + 1)
        return changed
    return draw(st.sampled_from(HOSTILE))


def alter_json(draw: Any, path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = dump(draw, alter_value(draw, json.loads(lines[at])))
        path.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
        return
    path.write_bytes(dump(draw, alter_value(draw, json.loads(text))).encode("utf-8", "surrogatepass"))


def dump(draw: Any, value: Any) -> str:
    text = json.dumps(value)
    if draw(st.integers(0, 9)) == 0 and text.startswith("{") and len(text) > 2:  # a key twice, the other value first
        key = next(iter(value))
        text = "{" + json.dumps(key) + ": " + json.dumps(draw(st.sampled_from(HOSTILE))) + ", " + text[1:]
    if draw(st.integers(0, 9)) == 0:
        text = text.replace("null", draw(st.sampled_from(["NaN", "Infinity", "1e999", "9" * 5000])), 1)
    return text


def alter_tensors(draw: Any, path: Path) -> None:
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    how = draw(st.integers(0, 8))
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = tensor.to(draw(st.sampled_from([torch.float16, torch.int64, torch.bool, torch.float64])))
    elif how == 2:
        tensors[name] = tensor.reshape(-1).clone()
    elif how == 3:
        tensors[name] = tensor[..., : draw(st.integers(0, 3))].clone().contiguous()
    elif how == 4:
        other = draw(st.sampled_from(["x", "../x", "lm_head.rows.delta", "model.embed_tokens.rows.index", name + ".y"]))
        tensors[other] = tensors.pop(name)
    elif how == 5:
        tensors[draw(st.sampled_from(["x", "model.norm.rows.index", "m.rows.delta", "a.b.c"]))] = tensor.clone()
    elif how == 6:
        tensors[name] = torch.full_like(tensor, draw(st.sampled_from([-1, 0, 5, 2**31 - 1])))
    elif how == 7 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, draw(st.sampled_from([float("nan"), float("inf"), 1e38])))
    else:
        tensors[name] = torch.cat([tensor.reshape(1, *tensor.shape)] * 2)
    save_file(tensors, path)


def alter(draw: Any, folder: Path) -> None:
    path = draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    how = draw(st.integers(0, 2))
    if how and path.suffix in (".json", ".jsonl"):
        return alter_json(draw, path)
    if how and path.suffix == ".safetensors":
        return alter_tensors(draw, path)
    if draw(st.integers(0, 29)) == 0:
        path.unlink()
        if draw(st.booleans()):
            path.symlink_to(draw(st.sampled_from(["/dev/zero", "/etc/passwd", "..", "nowhere"])))
        return None
    return alter_bytes(draw, path)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Inside, the process may take SPARE bytes more than it has; what asks for more fails with MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(loader: Loader, cases: int, where: Path) -> dict[str, int]:
    """Alters the files `cases` times and loads them; returns how many were refused and how many read."""
    counts = {"refused": 0, "read": 0}
    work = where / loader.folder.name
    meant = loader.load(shutil.copytree(loader.folder, work))

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def once(drawn: st.DataObject) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(loader.folder, work)
        alter(drawn.draw, work)
        links = any(path.is_symlink() for path in work.rglob("*"))  # a device may never end
        if loader.reseal is not None and not links and (loader.exact is False or drawn.draw(st.booleans())):
            try:
                loader.reseal(work)
            except Exception:  # too broken to be sealed: it is loaded as it is
                resealed = False
            else:
                resealed = True
        else:
            resealed = False
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            with little_memory():
                found = loader.load(work)
        except UserError as error:
            message = str(error)
            assert message.strip() and len(message) < 3000, message
            counts["refused"] += 1
        else:
            if loader.exact and not resealed:
                assert found == meant, "altered, and read as if nothing were"
            counts["read"] += 1
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    once()
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_altered_files_are_refused_in_a_sentence(name: str, made: Any, tmp_path: Path) -> None:
    counts = fuzz(made(name), 20, tmp_path)
    assert counts["refused"] >= 3, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_altered_files(name: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = fuzz(made(name), SLOW_CASES, tmp_path)
    with capsys.disabled():
        print(f"\n{name}: {counts['refused']:,} refused, {counts['read']:,} read", end="", flush=True)
    assert SLOW_CASES * len(NAMES) >= 10_000 and sum(counts.values()) >= SLOW_CASES


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [
        ("plain ü", 80, "plain ü"),
        ("a" * 81, 80, "a" * 80 + "…"),
        ("\x1b[2J\nx\ud800", 80, "\\x1b[2J\\nx\\ud800"),
        (["a\n", None], 80, "['a\\n', None]"),
        (10**30, 4, "1000…"),
    ],
)
def test_what_a_file_says_is_repeated_on_one_short_line(value: Any, limit: int, text: str) -> None:
    assert shown(value, limit) == text
