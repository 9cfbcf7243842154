"""The model card: what it says is what the run's files say, in the hub's own words, and nothing of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sparseft import S2FTConfig, attach, save_adapter
from sparseft.config import ModelConfig
from sparseft.errors import UserError
from sparseft.files.hashing import file_hash
from sparseft.models.loading import load_model
from sparseft.publish.card import LIBRARIES, card_of, checked, filled, is_untouched, sealed
from sparseft.publish.facts import facts_of
from sparseft.publish.licences import licence_in
from sparseft.report.run_data import read_run
from support.exported import maker
from support.published import HOME, finished_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Any:
    return maker(tmp_path_factory)("llama")


@pytest.fixture(scope="module")
def run(made: Any, tmp_path_factory: Any) -> Path:
    """Trained on a base and data of the hub."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finished_run(made[1], folder, base="meta/Base-1B", data="owner/questions")


@pytest.fixture(scope="module")
def card(run: Path) -> Any:
    return ModelCard(filled(card_of(facts_of(run)), "me/mine", None, None), ignore_metadata_errors=False)


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading, by their first cell."""
    rows = re.search(rf"^{re.escape(title)}$.*?\n\n(\|.*?)\n\n", text, re.M | re.S)
    assert rows, title
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_metadata_are_those_of_the_hub(card: Any) -> None:
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("meta/Base-1B", "adapter")
    assert (data.library_name, data.pipeline_tag, data.language) == ("sparseft", "text-generation", "en")
    assert data.datasets == ["owner/questions"] and {"sparseft", "sylva"} <= set(data.tags)
    assert data.license is None  # of a base whose files are not here nothing is known
    by_task = {result.dataset_name: result for result in data.eval_results}
    assert (by_task["boolq"].metric_value, by_task["mmlu"].metric_value) == (75.0, 40.0)
    assert by_task["mmlu"].dataset_type == "cais/mmlu" and by_task["boolq"].dataset_type == "boolq"
    assert "base 46.00" in by_task["mmlu"].metric_name and "± 0.40" in by_task["mmlu"].metric_name


def test_scores_stand_beside_the_base_with_their_errors(card: Any) -> None:
    rows = table(card.text, "## Evaluation")
    assert rows["boolq"] == ["50.0 ± 2.5 %", "75.0 ± 2.0 %", "+25.0 ± 1.5", "400, 3 of them trained on", "0"]
    assert rows["mmlu"] == ["46.0 ± 0.4 %", "40.0 ± 0.4 %", "−6.0 ± 0.3", "14,042", "5"]
    assert "2.500 before, 1.250 after" in card.text


def test_scores_of_another_adapter_are_left_out(made: Any, tmp_path: Path) -> None:
    """The run went on, or was trimmed, after they were measured."""
    run = finished_run(made[1], tmp_path / "run")
    for name, known in (("boolq", "of another"), ("mmlu", file_hash(run / "adapter/adapter_model.safetensors"))):
        content = json.loads((run / f"eval/{name}.json").read_text())
        (run / f"eval/{name}.json").write_text(json.dumps(content | {"sparseft": {"adapter_sha256": known}}))
    text = card_of(facts_of(run))
    assert list(table(text, "## Evaluation")) == ["mmlu"]
    assert [result.dataset_name for result in checked(text).data.eval_results] == ["mmlu"]


def test_card_and_report_take_a_result_from_the_same_file(made: Any, tmp_path: Path) -> None:
    """The one in which a task was asked for, then the newer one."""
    run = finished_run(made[1], tmp_path / "run")

    def add(file: str, age: int, **accuracies: float) -> None:
        tasks = {name: {"accuracy": value, "samples": 10, "shots": 0} for name, value in accuracies.items()}
        (run / f"eval/{file}.json").write_text(json.dumps({"task": file, "tasks": tasks}))
        os.utime(run / f"eval/{file}.json", (age, age))

    add("commonsense", 2_000_000_000, commonsense=0.5, boolq=0.25, piqa=0.5)  # newer than what was asked of boolq
    add("another", 1_000_000_000, another=0.5, piqa=0.25)
    expected = {"boolq": 0.75, "mmlu": 0.4, "commonsense": 0.5, "piqa": 0.5, "another": 0.5}
    assert {score.task: score.accuracy for score in facts_of(run).scores} == expected
    assert {name: score.accuracy for name, score in read_run(run).after.items()} == expected
    assert read_run(run).before["boolq"].accuracy == 0.5


@pytest.mark.parametrize("changed", [{}, {"shots": 5}, {"split": "validation"}, {"samples": 9}])
def test_a_base_that_was_asked_otherwise_stands_beside_nothing(
    changed: dict[str, Any], made: Any, tmp_path: Path
) -> None:
    run = finished_run(made[1], tmp_path / "run")
    entry = {"accuracy": 0.5, "samples": 10, "shots": 0, "split": "test"}
    (run / "eval/before").mkdir()
    for name, other in (("eval", {}), ("eval/before", changed)):
        (run / f"{name}/piqa.json").write_text(json.dumps({"task": "piqa", "tasks": {"piqa": entry | other}}))
    (score,) = [score for score in facts_of(run).scores if score.task == "piqa"]
    assert score.base == (None if changed else 0.5)
    assert (read_run(run).change("piqa") is None) == bool(changed)


def test_an_adapter_that_was_cut_back_is_told_from_the_trained_one(made: Any, tmp_path: Path) -> None:
    run = finished_run(made[1], tmp_path / "run")
    content = json.loads((run / "summary.json").read_text())
    trim = {"trimmed": True, "budget": 0.05, "source": {"file": f"{HOME}/general.txt", "forgetting_before": 0.7,
            "forgetting": 0.049}, "target": {"examples": 96, "loss_before": 1.25, "loss_after": 1.375}}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(content | {"trim": trim}))
    told = card_of(facts_of(run)).partition("## Evaluation")[2].partition("###")[0]
    assert "no more than 0.05 nats a token of `general.txt`: 0.700 as trained, 0.049 now" in told
    assert "On 96 examples of what it learnt, its loss is 1.250 as trained, 1.375 now." in told
    (run / "summary.json").write_text(json.dumps(content | {"trim": trim | {"trimmed": False}}))
    assert "cut back" not in card_of(facts_of(run))


def test_forgetting_is_what_was_not_trained(card: Any) -> None:
    told = card.text.partition("### Forgetting")[2].partition("##")[0]
    assert "mmlu" in told and "a loss beyond two standard errors" in told
    assert "boolq" not in told  # of the family that was trained


def test_forgetting_that_nobody_measured_is_said(run: Path, tmp_path: Path, made: Any) -> None:
    other = finished_run(made[1], tmp_path / "run")
    (other / "eval/mmlu.json").unlink()
    text = filled(card_of(facts_of(other)), "me/mine", None, None)
    assert "Not measured" in text and "--adapter me/mine" in text


def test_hardware_data_and_settings(card: Any) -> None:
    rows = table(card.text, "# Base-1B-sylva-questions")
    assert rows["hardware and time"] == ["2 × NVIDIA H100, 2 h 0 min (4.00 device hours), 3.00 GiB at most"]
    assert rows["base model"] == ["meta/Base-1B (revision `abc123`)"]
    assert rows["trained weights"] == ["1,200 of 40,000 (3.0 %)"] and "439 examples" in rows["data"][0]
    settings = table(card.text, "## Training")
    assert settings["seed"] == ["17"] and settings["sequences a step"] == ["12 of up to 96 tokens"]
    assert "torch 2.13.0" in settings["versions"][0]


def test_each_role_is_counted_as_the_adapter_itself_counts(made: Any) -> None:
    """Against the layers of the loaded model."""
    import sparseft
    from sparseft.layers import sparse_layers
    from support.exported import load

    model = sparseft.load_adapter(load(made[0]), made[1])
    entries: dict[str, list[int]] = {}
    for name, layer in sparse_layers(model).items():
        entries.setdefault(name.rpartition(".")[2], []).append(layer.trainable_entries)
    roles = {role.name: role for role in facts_of(made[1]).roles}
    assert {name: (len(counts), sum(counts)) for name, counts in entries.items()} == {
        name: (role.linears, role.trained) for name, role in roles.items()
    }
    assert roles["down_proj"].weights == 2 * 48 * 80


def test_a_prompt_is_shown_as_it_was_trained(card: Any) -> None:
    from sparseft.data.prompts import alpaca_prompt

    assert alpaca_prompt("{instruction}").rstrip() in card.text


@pytest.mark.parametrize(
    ("format", "setting", "expected"),
    [
        ("messages", "", "by the chat template"),
        ("messages", "plain_chat: true, ", "User: {question}\n\nAssistant:\n"),
        ("oasst_trees", "", "### Human: {question}### Assistant:\n"),
    ],
)
def test_conversations_are_shown_as_they_were_written(
    format: str, setting: str, expected: str, made: Any, tmp_path: Path
) -> None:
    run = finished_run(made[1], tmp_path / "run")
    for name, before, after in (
        ("environment.json", '"alpaca"', f'"{format}"'),
        ("config.yaml", "dataset: {", f"dataset: {{{setting}"),
    ):
        (run / name).write_text((run / name).read_text().replace(before, after))
    text = card_of(facts_of(run))
    assert expected in text and ("chat template of the base" in text) == (not setting and format == "messages")


@pytest.mark.parametrize(
    ("tokenizer", "loaded"),
    [("meta/Chat", "meta/Chat"), ("/home/alice/chat", "BASE_MODEL"), ("./alice/chat", "BASE_MODEL")],
)
def test_a_tokenizer_of_another_model_is_named(tokenizer: str, loaded: str, made: Any, tmp_path: Path) -> None:
    run = finished_run(made[1], tmp_path / "run")
    for name, before, after in (
        ("environment.json", '"alpaca"', '"messages"'),
        ("config.yaml", "model: {", f"model: {{tokenizer: {tokenizer}, "),
    ):
        (run / name).write_text((run / name).read_text().replace(before, after))
    text = card_of(facts_of(run))
    assert f'AutoTokenizer.from_pretrained("{loaded}")' in text and "alice" not in text
    assert f"chat template of the tokenizer {'meta/Chat' if '/Chat' in tokenizer else 'chat'}" in text


def test_every_tool_is_told_how_to_load_it(card: Any) -> None:
    text = card.text
    assert 'sparseft.load_adapter(model, "me/mine")' in text
    assert "sparseft export me/mine --format peft-lora" in text and "PeftModel.from_pretrained" in text
    assert "vllm serve meta/Base-1B --enable-lora --lora-modules tuned=my-lora --max-lora-rank 64" in text
    assert 'from_pretrained("meta/Base-1B", revision="abc123"' in text
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "card", "exec")


def test_nothing_of_this_machine_or_of_the_users_texts_is_told(made: Any, tmp_path: Path) -> None:
    text = filled(card_of(facts_of(finished_run(made[1], tmp_path / "run"))), "me/mine", None, None)
    assert HOME not in text and "alice" not in text and "what I asked" not in text and str(tmp_path) not in text
    assert "own.json" in text and "tiny-base" in text  # their last parts are
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None  # ids of the hub alone


def with_sources(run: Path, *names: str, **more: Any) -> str:
    """The card of a run that was trained on other data."""
    content = json.loads((run / "environment.json").read_text())
    content["data"] |= {"train": " + ".join(names), "sources": list(names)}
    (run / "environment.json").write_text(json.dumps(content | more))
    return filled(card_of(facts_of(run)), "me/mine", None, None)


@pytest.mark.parametrize(
    ("names", "ids", "told"),
    [
        (["medical/notes (train)", f"{HOME} smith/a + b/own.jsonl"], ["medical/notes"], "{0} + `own.jsonl`"),
        ([f"{HOME}/own.json", "owner/a:main (train[:10%])"], ["owner/a"], "`own.json` + {1}"),
        (["owner/a:one (train)", "owner/a:two (train)"], ["owner/a"], "{0} + {1}"),
        (["bundled:data/commonsense/train.json", "bundled:data/arithmetic/train.json"], None,
         "`bundled:data/commonsense/train.json` + `bundled:data/arithmetic/train.json`"),
        (["./corpus/medical (train)"], None, "`medical (train)`"),
        (["./corpus/medical:en (train)", "alice smith/notes"], None, "`medical:en (train)` + `notes`"),
        ([f"{HOME} (old)/own.json"], None, "`own.json`"),
    ],
)  # fmt: skip
def test_every_source_is_named(names: list[str], ids: Any, told: str, made: Any, tmp_path: Path) -> None:
    """Of the hub by its id, with a link, else by its last part, whatever else the run was trained on."""
    text = with_sources(finished_run(made[1], tmp_path / "run"), *names)
    links = [f"[{name}](https://huggingface.co/datasets/{re.split('[: ]', name)[0]})" for name in names]
    assert f", trained on {told.format(*links)} by the method" in text and "alice" not in text
    assert ModelCard(text).data.datasets == ids


def test_the_sources_of_an_older_run_are_told_apart(made: Any, tmp_path: Path) -> None:
    """Its file has them in one line."""
    run = finished_run(made[1], tmp_path / "run", data=f"{HOME}/a + b/x.json")
    assert "trained on `x.json` by" in card_of(facts_of(run))
    content = (run / "config.yaml").read_text().replace("language: en", f"mix: ['{HOME}/a.json:1', owner/b:1]")
    (run / "config.yaml").write_text(content)
    line = (run / "environment.json").read_text().replace(f"{HOME}/a + b/x.json", f"{HOME}/a.json + owner/b (train)")
    (run / "environment.json").write_text(line)
    text = card_of(facts_of(run))
    assert "trained on `a.json` + [owner/b (train)](https://huggingface.co/datasets/owner/b) by" in text
    assert "alice" not in text


def test_settings_name_no_folder_that_reads_as_an_id(made: Any, tmp_path: Path) -> None:
    run = finished_run(made[1], tmp_path / "run", data="corpus/medical")
    settings = with_sources(run, "./corpus/medical (train)").partition("```yaml")[2]
    assert "train_path: medical\n" in settings and "corpus" not in settings
    path = run / "config.yaml"
    path.write_text(re.sub(r"dataset: .*", "dataset: {name: json, eval_path: clients/held}", path.read_text()))
    path = run / "environment.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"data": known["data"] | {"eval": "./clients/held (validation)"}}))
    assert "clients" not in filled(card_of(facts_of(run)), "me/mine", None, None)


@pytest.mark.parametrize(
    ("setting", "names", "trained"),
    [
        # A mix, which is a data set of no family.
        ("name: json, mix: [arithmetic:0.7, commonsense:0.3]", ["bundled:data/commonsense/train.json"], True),
        ("name: json, mix: [own.json:1, zwhe99/commonsense_170k:1]", ["own.json"], True),
        ("name: json, mix: [own.json:1, other.json:1]", ["own.json", "other.json"], False),
        # Data of one's own, where no family was chosen, and where one was.
        ("name: json, train_path: my.jsonl", ["my.jsonl"], False),
        ("name: commonsense, train_path: my.jsonl", ["my.jsonl"], True),
        ("name: arithmetic, train_path: my.jsonl", ["my.jsonl"], False),
        ("name: boolq, train_path: my.jsonl", ["my.jsonl"], True),
        ("name: commonsense, train_path: google/boolq", ["google/boolq (train)"], True),
        ("name: commonsense", ["zwhe99/commonsense_170k (train)"], True),
        ("name: json, train_path: my.jsonl, replay: 'commonsense:0.1'", ["my.jsonl"], True),
    ],
)
def test_what_was_trained_is_judged_by_the_sources(
    setting: str, names: list[str], trained: bool, made: Any, tmp_path: Path
) -> None:
    run = finished_run(made[1], tmp_path / "run")
    found = re.sub(r"dataset: .*", f"dataset: {{{setting}}}", (run / "config.yaml").read_text())
    (run / "config.yaml").write_text(found)
    text = with_sources(run, *names)
    assert ("- boolq, not trained" in text) == (not trained) and "- mmlu, not trained" in text


@pytest.mark.parametrize(
    ("warning", "told"),
    [
        (f"{HOME}/own.json: 3 records left out", "own.json: 3 records left out"),
        (f"'{HOME}/my data/own.json' has (see {HOME}/x, ~/y) 1/2 of a/b", "'own.json' has (see x, y) 1/2 of a/b"),
        (f"mlflow: sqlite:///{HOME}/m.db, file://{HOME}/store/: locked", "mlflow: m.db, store: locked"),
        (f"asked of https://example.org/a/b:{HOME}/x", "asked of https://example.org/a/b:x"),
        ("'alice smith/x/b.jsonl', line 4; alice smith/x/c.jsonl, 1/2", "'b.jsonl', line 4; c.jsonl, 1/2"),
        ("alice smith/x/b.jsonl, ../../alice/b.jsonl, ~alice/x, ./alice/y", "b.jsonl, b.jsonl, x, y"),
        (f"{HOME} smith/d/b.jsonl: {HOME} smith/e.jsonl", "b.jsonl: e.jsonl"),
        ("url: https://alice:s3cret@mlflow.corp/log?token=alice; it", "url: https://mlflow.corp/log; it"),
    ],
)
def test_a_warning_of_the_training_names_no_folder(warning: str, told: str, made: Any, tmp_path: Path) -> None:
    run = finished_run(made[1], tmp_path / "run")
    with_sources(run, "owner/questions (train)", "alice smith/x/b.jsonl", f"{HOME} smith/d/b.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"warnings": [warning]}))
    text = card_of(facts_of(run))
    assert f"- From training: {told}\n" in text and "alice" not in text


def test_an_id_and_a_licence_fill_the_places_that_are_open(made: Any, tmp_path: Path) -> None:
    text = card_of(facts_of(finished_run(made[1], tmp_path / "run")))
    assert "BASE_MODEL" in text and "not stated here" in text
    text = filled(text, "me/mine", "meta/Base-1B", "apache-2.0")
    assert "BASE_MODEL" not in text and "not stated here" not in text and "USER/NAME" not in text
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.license) == ("meta/Base-1B", "adapter", "apache-2.0")
    assert is_untouched(text)


def test_an_adapter_alone_has_a_card(made: Any) -> None:
    text = filled(card_of(facts_of(made[1])), "me/mine", "meta/Base-1B", None)
    assert "No task was evaluated" in text and "down_proj" in text and ModelCard(text).data.library_name == "sparseft"


@pytest.mark.parametrize("kind", LIBRARIES)
def test_every_kind_has_a_card(run: Path, kind: str) -> None:
    text = filled(card_of(facts_of(run, kind, rank=8)), "me/mine", None, None)
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.library_name, data.base_model_relation) == LIBRARIES[kind] and "me/mine" in text
    assert "USER/NAME" not in text


# ---- the seal ----


def test_the_seal_tells_an_edited_card(card: Any) -> None:
    text = card.content
    assert is_untouched(text) and is_untouched(text.replace("\n", "\r\n")) and sealed(text) == text
    assert not is_untouched(text.replace("Forgetting", "Remembering"))
    assert not is_untouched(text.replace("license", "licence").replace("library_name: sparseft", "library_name: peft"))
    assert not is_untouched(text + "\nMore of it.\n")
    assert not is_untouched("# mine\n")


def test_metadata_that_the_hub_would_refuse_are_refused_here() -> None:
    with pytest.raises(UserError, match="metadata"):
        checked("---\nmodel-index: [nonsense]\n---\n# x\n")
    with pytest.raises(UserError, match="metadata"):
        checked("---\n- a\n- b\n---\n# x\n")


# ---- the licence of the base ----


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: gemma\n---\n# x"}, "gemma"),
        ({"LICENSE": "\n   Apache License\n   Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, "llama3.1"),
        ({"LICENSE": "Our own terms."}, "other"),
        ({"README.md": "---\nlicense: [\n---\n"}, None),
        ({"README.md": "# no metadata"}, None),
        ({}, None),
    ],
)
def test_the_licence_of_a_base(files: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_in(str(tmp_path)) == expected


def test_a_run_that_went_on_is_not_finished(made: Any, tmp_path: Path) -> None:
    run = finished_run(made[1], tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + "\n")
    with pytest.raises(UserError, match="continued past step 4"):
        facts_of(run)


def test_a_lora_is_counted_by_its_two_sides(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "meta/Base-1B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    sides = {"A": zeros(4, 48), "B": zeros(72, 4)}
    save_file({key.format(layer, side): t.clone() for layer in (0, 1) for side, t in sides.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (role,) = facts_of(tmp_path).roles
    assert (role.name, role.linears, role.trained, role.weights) == ("q_proj", 2, 2 * 4 * 120, 2 * 48 * 72)
    text = filled(card_of(facts_of(tmp_path)), "me/mine", None, None)
    assert ModelCard(text).data.library_name == "peft"
    assert "vllm serve meta/Base-1B --enable-lora --lora-modules tuned=me/mine --max-lora-rank 8" in text


def test_a_description_that_does_not_fit_is_refused(made: Any, tmp_path: Path) -> None:
    run = finished_run(made[1], tmp_path / "run")
    path = run / "adapter/adapter_config.json"
    content = json.loads(path.read_text())
    content["modules"].pop(next(iter(content["modules"])))
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not describe the tensors"):
        facts_of(run)


def test_a_base_in_a_folder_is_no_id_of_the_hub(made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """`models/x` reads as both: who trains beside the folder and publishes elsewhere must not name a stranger's."""
    shutil.copytree(made[0], tmp_path / "here" / "models" / "x")
    monkeypatch.chdir(tmp_path / "here")
    model = attach(load_model(ModelConfig(path="models/x")), S2FTConfig(o_ratio=0.5))
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    facts = facts_of(tmp_path / "adapter")
    assert facts.base == "./models/x" and facts.base_id is None
    assert "huggingface.co/models/x" not in card_of(facts)
