"""`train`, `preprocess`, `eval`, `report` and sweeps through the command line, in this process, on tiny models."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseft.evaluation import results
from sparseft.files.hashing import HASHED, body_hash
from support.pages import real_pages
from support.running import METHODS, Done, files, metrics, on, refused, sparseft, summary, write_data

SUMMARY = set(
    """method model dataset sparsity scope trainable_parameters scope_parameters total_parameters steps tokens
    train_seconds tokens_per_second peak_memory_bytes train_loss eval_loss_before eval_loss_after seed""".split()
)
METRICS = set("step epoch loss learning_rate grad_norm tokens_per_second step_seconds memory_gib".split())
CHECKPOINT = {"manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
SPARSE = {"adapter_config.json", "adapter_model.safetensors"}
ADAPTER = {
    "s2ft": SPARSE,
    "sylva": SPARSE,
    "lora": SPARSE | {"README.md"},
    "dora": SPARSE | {"README.md"},
    "full": {"sparseft_config.json", "config.json", "generation_config.json", "model.safetensors"},
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}  # a fully fine-tuned model can be loaded by itself
RUN = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "train_questions.safetensors", "report.html"}
SELECTION = {"selection/selection.json", "selection/selection.safetensors"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of this module's runs, with a data file of each kind."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def trained(world: Path, model_folder: Any) -> dict[str, Done]:
    """A run of three steps of every method, `run-<method>`, as its command ended."""
    done = {}
    with real_pages():
        for name, settings in METHODS.items():
            done[name] = sparseft(
                world, "train", "--json", *on(model_folder(), world / "pairs.jsonl"), *settings,
                "trainer.max_steps=3", "trainer.logging_steps=2", "trainer.eval_steps=2", f"output_dir=run-{name}",
            )  # fmt: skip
    return done


# ---- train: what it leaves ----


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_exactly_the_files_of_the_contract(method: str, world: Path, trained: dict[str, Done]) -> None:
    checkpoint = {f"checkpoints/checkpoint-3/{name}" for name in CHECKPOINT}
    adapters = {f"adapter/{name}" for name in ADAPTER[method]}
    adapters |= {f"checkpoints/checkpoint-3/{name}" for name in adapters}
    if method == "full":
        adapters |= {f"adapter/{name}" for name in TOKENIZER}
    expected = RUN | checkpoint | adapters | (SELECTION if method in ("s2ft", "sylva") else set())
    assert files(world / f"run-{method}") == expected


@pytest.mark.parametrize("method", METHODS)
def test_json_is_the_summary_and_the_run(method: str, world: Path, trained: dict[str, Done]) -> None:
    result = trained[method].json
    assert result.pop("run") == f"run-{method}"
    assert result == summary(world / f"run-{method}")
    assert result.keys() >= SUMMARY
    assert result["method"] == method
    assert result["steps"] == 3
    assert result["seed"] == 0
    assert result["dataset"] == str(world / "pairs.jsonl")
    assert 0 < result["trainable_parameters"] <= result["total_parameters"]
    assert result["tokens"] > 3 * 2 * 2  # three steps of two micro-steps of two sequences
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["train_seconds"])
    assert 50e6 < result["peak_memory_bytes"] < 64e9  # Python and torch alone are more than 50 MB
    if method == "full":
        assert result["sparsity"] is None and result["trainable_parameters"] == result["total_parameters"]
    else:
        frozen = 1 - result["trainable_parameters"] / result["scope_parameters"]
        assert result["sparsity"] == pytest.approx(frozen)
        assert abs(frozen - 0.9) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_metrics_lines(method: str, world: Path, trained: dict[str, Done]) -> None:
    lines = metrics(world / f"run-{method}")
    losses = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert all(line.keys() == METRICS for line in losses)
    assert all(line.keys() == {"step", "epoch", "eval_loss"} for line in evaluations)
    assert [line["step"] for line in losses] == [2, 3]  # the interval of two, and what is left at the end
    assert [line["step"] for line in evaluations] == [0, 2, 3]  # each once
    whole = summary(world / f"run-{method}")
    assert whole["train_loss"] == pytest.approx((2 * losses[0]["loss"] + losses[1]["loss"]) / 3)
    assert whole["eval_loss_before"] == evaluations[0]["eval_loss"]
    assert whole["eval_loss_after"] == evaluations[-1]["eval_loss"]
    assert all(line["step_seconds"] > 0 and 0.05 < line["memory_gib"] < 60 for line in losses)


@pytest.mark.parametrize("method", METHODS)
def test_environment_and_config_explain_the_run(
    method: str, world: Path, trained: dict[str, Done], model_folder: Any
) -> None:
    run = world / f"run-{method}"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] == "cpu" and environment["dtype"] == "float32" and environment["world_size"] == 1
    assert environment["versions"]["torch"] and environment["command_line"]
    assert environment["data"]["train"] == str(world / "pairs.jsonl")
    shown = sparseft(world, "train", "--cfg", f"--config-dir={run}", "output_dir=x")  # its folder is no obstacle
    assert shown.code == 0
    import yaml

    from sparseft.compose.run_config import from_dict

    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert config.method_name == method
    assert config.model.path == str(model_folder())
    assert config.trainer.max_steps == 3
    assert Path(config.output_dir).name == run.name


def test_stderr_is_useful_lines_only(trained: dict[str, Done]) -> None:
    begins = "data: model: selection: trainable run: eval step train: calibrate: score: second warning: export:".split()
    assert "trainable by role: " in trained["s2ft"].err and "trainable by role: " not in trained["sylva"].err
    for method, done in trained.items():
        odd = [line for line in done.err.splitlines() if not line.startswith(tuple(begins))]
        assert not odd, f"{method}: {odd}"
        assert "Warning" not in done.err


def test_the_last_run_is_outputs_latest(world: Path, trained: dict[str, Done]) -> None:
    link = world / "outputs" / "latest"
    assert link.is_symlink()
    assert link.resolve() == (world / "run-full").resolve()  # the one started last, wherever it lies


def test_text_output_sums_up(world: Path, model_folder: Any) -> None:
    done = sparseft(
        world, "train", *on(model_folder(), world / "pairs.jsonl"), *METHODS["s2ft"], "trainer.max_steps=1"
    )  # fmt: skip
    first, second = done.out.splitlines()
    assert first.startswith("s2ft: eval loss ") and "trainable parameters" in first
    run = world / second.removeprefix("run: ")
    assert run.parent.name == "outputs" and run.name.endswith("-s2ft-json")
    assert (world / "outputs" / "latest").resolve() == run.resolve()


def test_packing_is_of_what_is_at_once(in_tmp: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models pack single rows alone: they can where the hardware splits a batch into such."""
    from sparseft.training.job import set_up

    sizes = []
    monkeypatch.setattr(set_up, "check_packing", lambda model, rows: sizes.append(rows))
    words = [*on(model_folder(), write_data(in_tmp)["json"]), *METHODS["lora"], "trainer.max_steps=1"]
    words += ["dataset.packing=true", "trainer.gradient_accumulation=2", "trainer.batch_size=4"]
    done = sparseft(in_tmp, "train", *words, "hardware.micro_batch=1")
    assert sizes == [1] and "a step of 1 x 8 rows takes" in done.err


@pytest.mark.parametrize("objective", ["kto", "orpo", "dpo"])
def test_a_step_in_parts_is_another_one_for_some_objectives(objective: str, in_tmp: Path) -> None:
    pytest.importorskip("trl")
    words = [f"objective={objective}", "method=lora", "trainer.max_steps=1", "trainer.gradient_accumulation=1"]
    words += ["dataset.max_examples=16", "trainer.batch_size=4", "hardware=cpu", "hardware.micro_batch=2"]
    said = f"objective={objective} takes means over what is at once" in sparseft(in_tmp, "train", *words).err
    assert said == (objective != "dpo")


def test_a_run_again_does_not_replace_it(in_tmp: Path, model_folder: Any) -> None:
    """Its `config.yaml` as an experiment, however the run itself was started."""
    words = [*on(model_folder(), write_data(in_tmp)["json"]), *METHODS["lora"], "trainer.max_steps=1"]
    sparseft(in_tmp, "train", *words, "output_dir=run", "overwrite=true")
    sparseft(in_tmp, "train", *words, "output_dir=run", "trainer.resume=auto")
    text = (in_tmp / "run/config.yaml").read_text()
    (in_tmp / "own/experiment").mkdir(parents=True)
    head = "# @package _global_\ndefaults:\n  - override /method: lora\n"
    (in_tmp / "own/experiment/again.yaml").write_text(head + text)
    assert "already holds a run" in refused(in_tmp, "train", "--config-dir=own", "experiment=again")


def eval_loss(model: Any, tokenizer: Any, run: Path, data: Path) -> float:
    """The mean loss over the labelled tokens of the run's held-out examples, one at a time."""
    import torch
    import yaml

    from sparseft.compose.run_config import from_dict
    from sparseft.data.loading import load_datasets

    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    length, cache = config.trainer.max_length, run / "cache"
    loaded = load_datasets(config.dataset, tokenizer, max_length=length, seed=0, bundled=False, cache_dir=cache)
    total, count = 0.0, 0
    for example in loaded.eval:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        kept = labels != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        count += int(kept.sum())
    return total / count


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_reloads_to_the_loss_that_was_measured(
    method: str, world: Path, trained: dict[str, Done], model_folder: Any
) -> None:
    from sparseft.adapters.lifecycle import load_adapter
    from sparseft.config import ModelConfig
    from sparseft.models.loading import load_model, load_tokenizer

    run = world / f"run-{method}"
    tokenizer = load_tokenizer(ModelConfig(path=str(model_folder())))
    base = load_model(ModelConfig(path=str(model_folder())))
    assert eval_loss(base, tokenizer, run, world) == pytest.approx(summary(run)["eval_loss_before"], abs=2e-5)
    if method == "full":
        model = load_model(ModelConfig(path=str(run / "adapter")))
    else:
        model = load_adapter(base, run / "adapter").eval()
    assert eval_loss(model, tokenizer, run, world) == pytest.approx(summary(run)["eval_loss_after"], abs=2e-5)


def test_a_family_from_a_local_file(world: Path, model_folder: Any) -> None:
    """Each of them, of the bundled data: test_end_to_end.py."""
    result = sparseft(
        world, "train", "--json", *on(model_folder(), world / "guanaco.jsonl", "oasst1"), *METHODS["s2ft"],
        "trainer.max_steps=2", "trainer.learning_rate=1e-2",
    ).json  # fmt: skip
    assert result["run"].endswith("-s2ft-oasst1")
    assert result["eval_loss_after"] < result["eval_loss_before"]


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "s2ft"), ("qwen2", "sylva")])
def test_other_architectures(kind: str, method: str, world: Path, model_folder: Any) -> None:
    result = sparseft(
        world, "train", "--json", *on(model_folder(kind), world / "pairs.jsonl"), *METHODS[method],
        "trainer.max_steps=3", "trainer.learning_rate=5e-3", f"output_dir=run-{kind}-{method}",
        f"dataset.eval_path={world / 'pairs.jsonl'}",
    )  # fmt: skip
    assert result.json["eval_loss_after"] < result.json["eval_loss_before"]
    assert "Warning" not in result.err


def test_without_evaluation_examples(world: Path, model_folder: Any) -> None:
    words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS["lora"], "dataset.eval_fraction=0"]
    done = sparseft(world, "train", *words, "trainer.max_steps=1", "output_dir=no-eval")
    result = summary(world / "no-eval")
    assert result["eval_loss_before"] is None and result["eval_loss_after"] is None
    assert "eval loss" not in done.out
    message = refused(world, "train", *words, "trainer.eval_steps=1", "output_dir=no-eval-2")
    assert message.startswith("trainer.eval_steps=1: there are no evaluation examples")
    assert not (world / "no-eval-2").exists()


def test_gradient_checkpointing_trains_the_same(world: Path, model_folder: Any) -> None:
    losses = {}
    for method in ("s2ft", "lora"):
        for flag in ("false", "true"):
            words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS[method], f"output_dir=ckpt-{method}-{flag}"]
            words += ["method.dropout=0"] if method == "lora" else []
            words += ["trainer.max_steps=2", f"hardware.gradient_checkpointing={flag}"]
            losses[flag] = sparseft(world, "train", "--json", *words).json
        for key in ("train_loss", "eval_loss_after"):
            assert losses["true"][key] == pytest.approx(losses["false"][key], abs=1e-6), method


# ---- preprocess and its cache ----


@pytest.fixture(scope="module")
def preprocessed(world: Path, model_folder: Any) -> dict[str, Any]:
    words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS["sylva"], "cache_dir=cache"]
    return sparseft(world, "preprocess", "--json", *words).json


def test_preprocess_prints_where_the_selection_lies(
    world: Path, preprocessed: dict[str, Any], model_folder: Any
) -> None:
    assert preprocessed.keys() == {"selection", "cached", "seconds", "trainable_parameters"}
    assert preprocessed["cached"] is False
    folder = world / preprocessed["selection"]
    assert files(folder) == {"selection.json", "selection.safetensors"}
    words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS["sylva"], "cache_dir=cache"]
    again = sparseft(world, "preprocess", *words)
    assert again.out == preprocessed["selection"] + "\n"
    assert f"selection: cached, {preprocessed['selection']}" in again.err


def test_a_cache_that_cannot_be_is_refused_before_scoring(in_tmp: Path) -> None:
    (in_tmp / "taken").write_text("")
    done = sparseft(in_tmp, "preprocess", "cache_dir=taken/cache", code=2)
    assert "error: cache_dir=taken/cache: " in done.err and done.err.rstrip().endswith("taken is no folder.")
    assert "calibrate" not in done.err and files(in_tmp) == {"taken"}


def test_train_uses_what_preprocess_left(world: Path, preprocessed: dict[str, Any], model_folder: Any) -> None:
    words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS["sylva"], "cache_dir=cache", "trainer.max_steps=1"]
    done = sparseft(world, "train", "--json", *words, "output_dir=reused", "trainer.learning_rate=3e-4")
    assert f"selection: cached, {preprocessed['selection']}" in done.err
    assert "calibrate" not in done.err
    assert done.json["selection_cached"] is True
    assert done.json["trainable_parameters"] == preprocessed["trainable_parameters"]
    used, cached = world / "reused" / "selection", world / preprocessed["selection"]
    assert (used / "selection.safetensors").read_bytes() == (cached / "selection.safetensors").read_bytes()
    assert json.loads((used / "selection.json").read_text()) == json.loads((cached / "selection.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        ["seed=1"],
        ["method.seed=1"],
        ["sparsity=0.8"],
        ["method.block_size=4"],
        ["method.num_samples=7"],
        ["method.importance=fisher"],
        ["scope=self_attn"],
        ["dataset.train_path={world}/guanaco.jsonl"],
        ["dataset.max_examples=20"],
        ["trainer.max_length=6"],
        ["model.path={other}"],
    ],
    ids=lambda words: words[0].partition("=")[0] + "=" + words[0].partition("=")[2].rpartition("/")[2],
)
def test_another_key_is_computed_anew(
    change: list[str], world: Path, preprocessed: dict[str, Any], model_folder: Any
) -> None:
    import torch

    other = model_folder("llama", torch.bfloat16)  # same seed, other dtype: the same weights but rounded
    change = [word.format(world=world, other=model_folder("qwen2")) for word in change]
    assert other is not None
    words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS["sylva"], "cache_dir=cache"]
    kept = [word for word in words if word.partition("=")[0] not in {w.partition("=")[0] for w in change}]
    result = sparseft(world, "preprocess", "--json", *kept, *change).json
    assert result["cached"] is False
    assert result["selection"] != preprocessed["selection"]


def test_what_does_not_matter_to_the_selection_keeps_the_key(
    world: Path, preprocessed: dict[str, Any], model_folder: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "copy of the data.json"
    shutil.copy(world / "pairs.jsonl", copy)  # the examples count, not the file's name
    words = [*on(model_folder(), copy), *METHODS["sylva"], f"cache_dir={world / 'cache'}"]
    result = sparseft(tmp_path, "preprocess", "--json", *words, "trainer.learning_rate=1", "trainer.num_epochs=9").json
    assert result["cached"] is True
    assert Path(result["selection"]).name == Path(preprocessed["selection"]).name


def test_a_damaged_cache_is_computed_anew_and_said(
    world: Path, preprocessed: dict[str, Any], model_folder: Any, tmp_path: Path
) -> None:
    shutil.copytree(world / "cache", tmp_path / "cache")
    (damaged,) = tmp_path.rglob(f"{Path(preprocessed['selection']).name}/selection.safetensors")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-8])
    words = [*on(model_folder(), world / "pairs.jsonl"), *METHODS["sylva"], "cache_dir=cache"]
    done = sparseft(tmp_path, "preprocess", "--json", *words)
    assert "warning: the cached selection is unusable" in done.err
    assert done.json["cached"] is False
    assert damaged.read_bytes() == whole


@pytest.mark.parametrize("method", ["lora", "full"])
def test_preprocess_needs_a_method_that_selects(method: str, in_tmp: Path) -> None:
    assert refused(in_tmp, "preprocess", f"method={method}") == (
        f"method={method} selects nothing to preprocess: use s2ft, sylva, paca or losia."
    )
    assert not files(in_tmp)


# ---- wrong input ----


def wrong(words: str, *parts: str, id: str | None = None) -> Any:
    return pytest.param(words.split(), parts, id=id or words)


WRONG = [
    wrong("modle=tiny", "'modle", "model"),
    wrong("scope=self_atn", "scope=self_atn matches no linear", "self_attn"),
    wrong("scope=lm_head", "scope=lm_head matches no linear"),
    wrong("method.block_size=128", "method.block_size=128 is larger than both sides", "at most"),
    wrong("method=lora scope=self_atn", "scope=self_atn matches no linear", "self_attn"),
    wrong("method=lora method.targets=[q_prj]", "q_prj", "q_proj"),
    wrong("method=s2ft sparsity=0.05 method.roles=[down]", "sparsity=0.05 asks for"),
    wrong("hardware.device=cuda", "hardware.device=cuda", "auto or cpu"),
    wrong("hardware.num_machines=2", "hardware.num_machines=2", "srun"),
    wrong("hardware.offload=cpu", "hardware.offload=cpu", "hardware.zero_stage"),
    wrong("trainer.resume=auto", "trainer.resume needs output_dir"),
    wrong("trainer.resume=auto output_dir=x overwrite=true", "exclude each other"),
    wrong("trainer.optimizer=adamw_bnb_8bit", "trainer.optimizer=adamw_bnb_8bit", "cannot be used here"),
    wrong("model.path=./no-such", "model.path=./no-such: no such folder"),
    wrong("model.path=.", "model.path=.", "no config.json"),
    wrong("model.tokenizer=./no-such", "model.tokenizer=./no-such: no such folder"),
    wrong("dataset.train_path=pears.jsonl", "there is no file 'pears.jsonl'", "pairs.jsonl"),
    wrong("dataset.eval_path=nothing/here.json", "dataset.eval_path", "nothing/here.json"),
    wrong("dataset.train_path=empty.json", "empty.json is empty"),
    wrong("dataset.train_path=none.json", "none.json holds no records"),
    wrong("dataset.train_path=bad.jsonl", "bad.jsonl, line 2, column"),
    wrong("dataset.train_path=odd.jsonl", "odd.jsonl, line 2"),
    wrong("trainer.max_length=1", "trainer.max_length"),
    wrong("dataset=text dataset.train_path=long.txt trainer.max_length=512", "trainer.max_length=512", "128 tokens"),
]


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="one case needs a machine without a GPU")
@pytest.mark.parametrize(("words", "parts"), WRONG)
def test_wrong_input_is_one_message_and_leaves_nothing(
    words: list[str], parts: tuple[str, ...], in_tmp: Path, model_folder: Any
) -> None:
    write_data(in_tmp)
    (in_tmp / "empty.json").write_text("")
    (in_tmp / "none.json").write_text("[]")
    good = {"prompt": "1 + 1 = ", "completion": "2"}
    (in_tmp / "bad.jsonl").write_text(json.dumps(good) + '\n{"prompt": \n')
    (in_tmp / "odd.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | {"completion": 7}) + "\n")
    (in_tmp / "long.txt").write_text("word " * 2000)
    before = files(in_tmp)
    keys = {word.partition("=")[0] for word in words}
    base = [*on(model_folder(), in_tmp / "pairs.jsonl"), *METHODS["sylva"][:3], "method.importance=random"]
    base = [word for word in base if word.partition("=")[0] not in keys]
    if "method" in keys:
        base = [word for word in base if not word.startswith("method.")]
    message = refused(in_tmp, "train", *base, *words)
    for part in parts:
        assert part in message
    assert not {name for name in files(in_tmp) - before if not name.startswith(".cache/")}


def test_a_bad_record_names_file_and_line(in_tmp: Path, model_folder: Any) -> None:
    lines = [{"text": "### Human: hi### Assistant: yes"}, {"text": "### Human: and now?"}]
    (in_tmp / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(in_tmp, "train", *on(model_folder(), in_tmp / "talk.jsonl", "oasst1"), *METHODS["s2ft"])
    assert "talk.jsonl, line 2" in message


def test_cheap_checks_come_before_any_loading(in_tmp: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds a run, missing files and the like are refused before tokenizer, data and model load."""
    from sparseft.models import loading
    from sparseft.training import prepare as preparing

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    for module, name in ((preparing, "load_tokenizer"), (preparing, "data_of"), (loading, "load_model")):
        monkeypatch.setattr(module, name, loads)
    (in_tmp / "old").mkdir()
    (in_tmp / "old" / "config.yaml").write_text("seed: 0\n")
    data = write_data(in_tmp)["json"]
    base = [*on(model_folder(), data), *METHODS["s2ft"]]
    for words, part in (
        (["output_dir=old"], "already holds a run"),
        (["output_dir=pairs.jsonl"], "is a file"),
        (["output_dir=pairs.jsonl/run"], "is a file"),
        (["trainer.resume=auto"], "needs output_dir"),
        (["hardware.num_machines=2"], "srun"),
        (["dataset.eval_path=gone.json"], "gone.json"),
    ):
        assert part in refused(in_tmp, "train", *base, *words)


def test_a_folder_with_a_run_is_kept_replaced_or_continued(in_tmp: Path, model_folder: Any) -> None:
    data = write_data(in_tmp)["json"]
    words = ["train", *on(model_folder(), data), *METHODS["s2ft"], "trainer.max_steps=2", "output_dir=run"]
    sparseft(in_tmp, *words)
    (in_tmp / "run" / "notes.txt").write_text("mine")
    before = {name: (in_tmp / "run" / name).read_bytes() for name in files(in_tmp / "run")}
    message = refused(in_tmp, *words, "seed=1")
    assert message == (
        "output_dir 'run' already holds a run: give another folder, continue it with trainer.resume=auto, or replace "
        "it with overwrite=true."
    )
    assert {name: (in_tmp / "run" / name).read_bytes() for name in files(in_tmp / "run")} == before
    # Replacing waits until the new run's settings have proved valid.
    refused(in_tmp, *words, "overwrite=true", "scope=nowhere")
    assert {name: (in_tmp / "run" / name).read_bytes() for name in files(in_tmp / "run")} == before
    sparseft(in_tmp, *words, "overwrite=true", "seed=1", "trainer.max_steps=1")
    assert summary(in_tmp / "run")["seed"] == 1
    assert [line["step"] for line in metrics(in_tmp / "run")] == [0, 1, 1]
    assert files(in_tmp / "run") == {name.replace("checkpoint-2", "checkpoint-1") for name in before}
    assert (in_tmp / "run" / "notes.txt").read_text() == "mine"


# ---- eval ----


@pytest.fixture(scope="module")
def questions(world: Path) -> Path:
    """A folder with a small MMLU of one subject, and boolq in the LLM-Adapters form."""
    folder = world / "questions"
    for split, count in (("dev", 5), ("test", 6)):
        path = folder / "mmlu" / split
        path.mkdir(parents=True)
        rows = [f"{n} + {n}?,{2 * n},{2 * n + 1},{n},0,A" for n in range(1, count + 1)]
        (path / f"doubling_{split}.csv").write_text("\n".join(rows) + "\n")
    (folder / "commonsense" / "boolq").mkdir(parents=True)
    records = [{"instruction": f"Is {n} even?", "input": "", "output": "the correct answer is true", "answer": "true"}
               for n in (2, 4)]  # fmt: skip
    (folder / "commonsense" / "boolq" / "test.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_eval_of_a_run_leaves_results_in_it(
    method: str, world: Path, trained: dict[str, Done], questions: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / f"run-{method}", run)
    before = files(run)
    done = sparseft(
        tmp_path, "eval", "mmlu", "--shots", "2", "--limit", "4", f"--run={run}", f"eval.data_dir={questions}", "--json"
    )  # fmt: skip
    result = done.json
    assert "run" in result["evaluated"] and str(run.name) in result["evaluated"]
    assert f"evaluating {result['evaluated']} on mmlu" in done.err
    entry = result["tasks"]["mmlu"]
    assert entry["samples"] == 4 and entry["shots"] == 2
    assert 0 <= entry["accuracy"] <= 1
    assert files(run) - before == {"eval/mmlu.json", "eval/mmlu.samples.jsonl"}
    stored = json.loads((run / "eval" / "mmlu.json").read_text())
    assert stored["sparseft"]["evaluated"] == result["evaluated"]
    assert stored["tasks"]["mmlu"]["accuracy"] == entry["accuracy"]


def test_eval_on_a_full_disk_says_so(
    world: Path, trained: dict[str, Done], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "run-s2ft", tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results, "write_json", full)
    words = ["mmlu", "--limit", "2", "--shots", "0", "--run=run", f"eval.data_dir={questions}"]
    done = sparseft(tmp_path, "eval", *words, code=1)
    assert "error: the results in 'run/eval' could not be written: No space left on device." in done.err


def test_eval_latest_adapter_and_base_say_what_they_evaluate(
    world: Path, trained: dict[str, Done], questions: Path, model_folder: Any, tmp_path: Path
) -> None:
    shutil.copytree(world / "run-sylva", tmp_path / "run")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "latest").symlink_to("../run")
    common = ["--limit=2", "--shots=1", f"eval.data_dir={questions}", "--json"]
    latest = sparseft(tmp_path, "eval", "mmlu", *common)
    assert latest.json["evaluated"] == f"the latest run run (on {model_folder()})"
    adapter = sparseft(tmp_path, "eval", "mmlu", f"--adapter={tmp_path / 'run' / 'adapter'}", *common)
    assert adapter.json["evaluated"].startswith(f"the adapter {tmp_path / 'run' / 'adapter'} (on ")
    base = sparseft(tmp_path, "eval", "mmlu", "--base", f"model.path={model_folder()}", *common)
    assert base.json["evaluated"] == f"the base model {model_folder()}"
    # The same adapter, by either way; its tasks' files lie in the run and in folders of their own.
    assert latest.json["tasks"] == adapter.json["tasks"]
    assert all(Path(tmp_path, name).is_relative_to(tmp_path / "run") for name in latest.json["files"])
    for result in (adapter.json, base.json):
        assert all(name.startswith("outputs/eval-") for name in result["files"])
    table = sparseft(tmp_path, "eval", "mmlu", *common[:-1])
    assert table.out.startswith("Evaluated: the latest run run")


def test_eval_without_a_run_is_of_the_base_and_says_so(in_tmp: Path, questions: Path, model_folder: Any) -> None:
    words = ["--limit=1", "--shots=1", f"eval.data_dir={questions}", f"model.path={model_folder()}", "--json"]
    done = sparseft(in_tmp, "eval", "mmlu", *words)
    assert done.json["evaluated"] == f"the base model {model_folder()} (there is no run yet)"


def test_an_adapter_that_names_no_base_needs_one(
    world: Path, trained: dict[str, Done], questions: Path, model_folder: Any, tmp_path: Path
) -> None:
    shutil.copytree(world / "run-lora" / "adapter", tmp_path / "lora")
    content = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    del content["sparseft"]
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": None}))
    words = ["mmlu", "--adapter=lora", "--limit=1", "--shots=1", f"eval.data_dir={questions}"]
    assert "names no base model" in refused(tmp_path, "eval", *words)
    assert sparseft(tmp_path, "eval", *words, f"model.path={model_folder()}", "--json").json["tasks"]["mmlu"]


def test_a_whole_model_takes_no_base(world: Path, trained: dict[str, Done], questions: Path, model_folder: Any) -> None:
    words = ["mmlu", "--run=run-full", f"eval.data_dir={questions}", f"model.path={model_folder()}"]
    assert "is a whole model" in refused(world, "eval", *words)


def test_a_whole_model_without_tokenizer_takes_its_base_s(
    world: Path, trained: dict[str, Done], questions: Path, model_folder: Any, tmp_path: Path
) -> None:
    """As a checkpoint of full fine-tuning is."""
    saved = world / "run-full" / "checkpoints" / "checkpoint-3" / "adapter"
    assert not (saved / "tokenizer_config.json").exists()
    words = ["mmlu", f"--adapter={saved}", "--shots=1", "--limit=2", f"eval.data_dir={questions}", "--json"]
    assert sparseft(tmp_path, "eval", *words).json["tasks"]["mmlu"]["samples"]
    folder = tmp_path / "moved"
    shutil.copytree(saved, folder)
    described = folder / "sparseft_config.json"
    described.write_text(described.read_text().replace(str(model_folder()), "/gone/base"))
    words[1] = f"--adapter={folder}"
    assert "has no tokenizer, and its base /gone/base is not there: give model.tokenizer" in refused(
        tmp_path, "eval", *words[:-1]
    )
    sparseft(tmp_path, "eval", *words, f"model.tokenizer={model_folder()}")


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["c_attn", "lm_head"]}], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_folder_made_by_peft_is_scored_beside_the_base(
    options: dict[str, Any], questions: Path, model_folder: Any, tmp_path: Path
) -> None:
    """Oracle: the base evaluated by itself; its head is tied to its embeddings."""
    import peft
    import torch
    import transformers

    base = model_folder("gpt2")
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["c_attn"]} | options)
    wrapped = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "peft")
    words = ["mmlu_doubling", "--shots=1", f"eval.data_dir={questions}", f"model.path={base}", "--json"]
    alone = sparseft(tmp_path, "eval", "--base", *words, "output_dir=alone").json["tasks"]["mmlu_doubling"]
    both = sparseft(tmp_path, "eval", "--adapter=peft", *words, "output_dir=both").json["tasks"]["mmlu_doubling"]
    assert both["base"] == alone["accuracy"]
    lines = [
        [
            json.loads(line)
            for line in (tmp_path / name / "eval" / "mmlu_doubling.samples.jsonl").read_text().splitlines()
        ]
        for name in ("alone", "both")
    ]
    for one, two in zip(*lines, strict=True):
        assert two["base"]["loglikelihoods"] == one["loglikelihoods"] != two["loglikelihoods"]


ALTERED: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda f: flip(f / "model.safetensors"),
    "truncated weights": lambda f: os.truncate(f / "model.safetensors", 5000),
    "another epsilon": lambda f: (f / "config.json").write_text(
        json.dumps(json.loads((f / "config.json").read_text()) | {"rms_norm_eps": 0.5})
    ),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "other weights beside them": lambda f: shutil.copy(f / "model.safetensors", f / "pytorch_model.bin"),
    "another method": lambda f: (f / "sparseft_config.json").write_text(
        (f / "sparseft_config.json").read_text().replace('"full"', '"s2ft"')
    ),
    "a file above": lambda f: rename_described(f, "../config.yaml"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def rename_described(folder: Path, name: str) -> None:
    """The description, its own hash included, names a file elsewhere."""
    path = folder / "sparseft_config.json"
    content = json.loads(path.read_text())
    content["files"][name] = content["files"].pop("generation_config.json")
    path.write_text(json.dumps(content | {"config_sha256": body_hash(content, HASHED)}))


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_whole_model_is_refused(
    what: str, world: Path, trained: dict[str, Done], questions: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "run-full", run)
    words = ["boolq", f"--run={run}", "--limit=1", f"eval.data_dir={questions}", "eval.compare_base=false"]
    if what == "truncated weights":  # as it was written it is evaluated
        assert sparseft(tmp_path, "eval", *words, "--json").json["tasks"]["boolq"]["samples"] == 1
        shutil.rmtree(run / "eval")
    ALTERED[what](run / "adapter")
    assert refused(tmp_path, "eval", *words).startswith("run/adapter: ")
    assert not (run / "eval").exists()


def test_the_block_size_follows_the_sparsity(in_tmp: Path, model_folder: Any) -> None:
    """Concrete in all that a run leaves but its config, and in the cache's key."""
    words = [*on(model_folder(), write_data(in_tmp)["json"]), "method=sylva", "sparsity=0.95", "method.num_samples=4"]
    done = sparseft(in_tmp, "train", "--json", *words, "trainer.max_steps=1", "output_dir=run")
    assert "in blocks of 8" in done.err and done.json["warnings"] == []
    assert 1 - done.json["sparsity"] == pytest.approx(0.05, rel=0.1)
    assert done.json["method_config"]["block_size"] == 8
    for name in ("selection/selection.json", "adapter/adapter_config.json"):
        content = json.loads((in_tmp / "run" / name).read_text())
        assert content["block_size"] == 8 or name.startswith("adapter"), name
        described = content["method_config"] if "method_config" in content else content["sparseft"]["method_config"]
        assert described["block_size"] == 8, name
    assert "block_size: null" in (in_tmp / "run/config.yaml").read_text()
    given = sparseft(in_tmp, "preprocess", "--json", *words, "method.block_size=8").json
    assert given["cached"] is True and given["trainable_parameters"] == done.json["trainable_parameters"]
    plan = [word for word in words if not word.startswith("method.num_samples")]
    planned = sparseft(in_tmp, "train", "--plan", "--json", *plan).json
    assert planned["trainable_parameters"] == pytest.approx(done.json["trainable_parameters"], rel=0.01)
    coarse = sparseft(in_tmp, "train", "--plan", "--json", *plan, "method.block_size=32").json
    assert coarse["trainable_parameters"] > 1.1 * planned["trainable_parameters"]


def test_a_sparsity_that_no_block_size_meets_is_warned_about(in_tmp: Path, model_folder: Any) -> None:
    words = [*on(model_folder(), write_data(in_tmp)["json"]), "method=sylva", "method.importance=random"]
    done = sparseft(in_tmp, "preprocess", *words, "sparsity=0.999")
    assert "sparsity 0.999 asks for 41 trainable weights; with blocks of 4 it is 224" in done.err
    given = sparseft(in_tmp, "preprocess", "--json", *words, "sparsity=0.999", "method.block_size=8")
    assert "asks for 41 trainable weights; with blocks of 8 it is" in given.err
    assert given.json["trainable_parameters"] > 224


def test_a_run_from_before_the_block_size_followed_is_continued(in_tmp: Path, model_folder: Any) -> None:
    """Runs had 64 in their config where nothing was given; they go on with the blocks that they train."""
    words = [*on(model_folder(), write_data(in_tmp)["json"]), "method=sylva", "method.importance=random",
             "output_dir=run", "trainer.save_steps=2", "method.reselect_steps=3"]  # fmt: skip
    sparseft(in_tmp, "train", *words, "trainer.max_steps=2", "method.block_size=16")
    config = in_tmp / "run/config.yaml"
    config.write_text(config.read_text().replace("block_size: 16", "block_size: 64"))
    resumed = sparseft(in_tmp, "train", *words, "trainer.max_steps=4", "trainer.resume=auto")
    assert "re-selection at step 3" in resumed.err and "in blocks of 16" in resumed.err
    assert json.loads((in_tmp / "run/adapter/adapter_config.json").read_text())["block_size"] == 16


def test_the_default_sparsity_missed_is_warned_about(in_tmp: Path, model_folder: Any) -> None:
    data = write_data(in_tmp)["json"]
    words = [*on(model_folder(), data), "method=sylva", "method.block_size=32", "trainer.max_steps=1"]
    done = sparseft(in_tmp, "train", "--json", *words)
    (warning,) = done.json["warnings"]
    assert "sparsity 0.984 asks for" in warning and "blocks of 32" in warning


def test_eval_uses_the_trained_weights(
    world: Path, questions: Path, trained: dict[str, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is evaluated has the run's eval loss, not the base's."""
    from sparseft.compose.run_config import compose
    from sparseft.config import ModelConfig
    from sparseft.evaluation.target import find_target, load_target
    from sparseft.models.loading import load_tokenizer

    monkeypatch.chdir(world)
    for method in METHODS:
        config = compose("eval", [])
        target = find_target(config, run=f"run-{method}", adapter=None, base=False)
        model, tokenizer = load_target(target, config)
        found = eval_loss(model, tokenizer, world / f"run-{method}", world)
        assert found == pytest.approx(summary(world / f"run-{method}")["eval_loss_after"], abs=2e-5), method
    assert load_tokenizer(ModelConfig(path=str(world / "run-full" / "adapter"))).get_vocab() == tokenizer.get_vocab()


def test_a_run_folder_does_not_decide_that_a_models_code_runs(
    world: Path, trained: dict[str, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseft.compose.run_config import compose
    from sparseft.evaluation.target import find_target

    run = tmp_path / "run"
    shutil.copytree(world / "run-s2ft", run)
    text = (run / "config.yaml").read_text()
    assert "trust_remote_code: false" in text
    (run / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    monkeypatch.chdir(world)
    for words, trusted in (([], False), (["model.trust_remote_code=true"], True)):
        target = find_target(compose("eval", words), run=str(run), adapter=None, base=False, overrides=words)
        assert target.model.trust_remote_code is trusted


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["mmlu", "--run=nowhere"], ["no run 'nowhere'"]),
        (["mmlu", "--run=empty"], ["'empty' holds no run"]),
        (["mmlu", "--adapter=nowhere"], ["--adapter nowhere: no such folder (looked in "]),
        (["mmlu", "--adapter=emty/adapter"], ["--adapter emty/adapter: no such folder", "Did you mean 'empty'?"]),
        (["mmlu", "--run=emty"], ["no run 'emty' (looked in ", "there is nothing of that name"]),
        (["mmlu", "--adapter=empty"], ["empty", "adapter"]),
        (["mmlv", "--base"], ["mmlv", "mmlu"]),
        (["mmlu", "--base", "hardware.num_processes=2"], ["hardware.num_processes=2"]),
        (["mmlu", "--base", "eval.data_dir=nothing"], ["eval.data_dir=nothing: no such folder (looked in "]),
        (["mmlu", "--base", "eval.data_dir=./emty"], ["eval.data_dir=./emty: no such folder", "Did you mean 'empty'?"]),
        (["mmlu", "--base", "eval.split=tests"], ["eval.split=tests", "test"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_wrong_evaluations(words: list[str], parts: list[str], in_tmp: Path) -> None:
    (in_tmp / "empty").mkdir()
    message = refused(in_tmp, "eval", *words)
    for part in parts:
        assert part in message
    assert not files(in_tmp)


# ---- report, sweep ----


def test_report_of_one_and_of_several(world: Path, trained: dict[str, Done]) -> None:
    assert "<svg" in (world / "run-lora" / "report.html").read_text()  # what the run itself left
    with real_pages():
        one = sparseft(world, "report", "run-lora", "--json").json
        assert one == {"report": "run-lora/report.html", "runs": ["run-lora"]}
        several = sparseft(world, "report", "run-s2ft", "run-sylva", "run-lora", "--json").json
    page = (world / several["report"]).read_text()
    assert all(name in page for name in ("run-s2ft", "run-sylva", "run-lora"))


def test_a_sweep_is_a_run_folder_a_point(in_tmp: Path, model_folder: Any) -> None:
    data = write_data(in_tmp)["json"]
    words = on(model_folder(), data)
    done = sparseft(
        in_tmp, "train", "-m", "--json", *words, "method=s2ft,lora", "trainer.max_steps=1", "output_dir=sweep",
    )  # fmt: skip
    points = done.json["points"]
    assert [point["exit_code"] for point in points] == [0, 0]
    assert [point["result"]["method"] for point in points] == ["s2ft", "lora"]
    assert [point["result"]["run"] for point in points] == ["sweep/0", "sweep/1"]
    said = [line for line in done.err.splitlines() if line.startswith(("data: ", "model: "))]
    assert len(said) == len(set(said))  # what the points share is said once
    assert done.err.count("\neval loss before: ") == 2  # what comes of each, each says
    assert summary(in_tmp / "sweep" / "0")["method"] == "s2ft"
    assert summary(in_tmp / "sweep" / "1")["method"] == "lora"


def test_a_sweep_goes_on_past_a_failing_point(in_tmp: Path, model_folder: Any) -> None:
    data = write_data(in_tmp)["json"]
    done = sparseft(
        in_tmp, "train", "-m", *on(model_folder(), data), *METHODS["s2ft"][:1], "scope=nowhere,mlp",
        "trainer.max_steps=1", "output_dir=sweep", code=2,
    )  # fmt: skip
    assert "point 0: scope=nowhere failed with exit code 2" in done.out
    assert "point 1: scope=mlp done, sweep/1" in done.out
    assert not (in_tmp / "sweep" / "0").exists()
