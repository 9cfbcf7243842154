"""`trainer.report_to`: what each tracker holds, read back from its own files, against the run's metrics."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseft import console
from sparseft.errors import UserError
from sparseft.layers import sparse_layers
from sparseft.models.spec import ModelSpec
from sparseft.runs.folder import TRACKED
from sparseft.selection.picture import draw_shares, trained_shares
from sparseft.training import trackers
from support.running import METHODS, files, metrics, on, refused, sparseft, summary, write_data
from support.training import attached, same_end

VARIABLES = "TENSORBOARD_LOGGING_DIR WANDB_MODE WANDB_PROJECT WANDB_DIR MLFLOW_TRACKING_URI TRACKIO_DIR".split()
ALL = f"trainer.report_to=[{','.join(TRACKED)}]"
NAMES = "loss learning_rate grad_norm tokens_per_second step_seconds memory_gib".split()


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_STORAGE_MODE", "sqlite")
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> list[str]:
    data = write_data(tmp_path_factory.mktemp("data"))["json"]
    words = [*on(model_folder(), data), *METHODS["lora"], "method.dropout=0.2", "trainer.learning_rate=1e-2"]
    words += ["trainer.save_steps=2", "trainer.eval_steps=2", "trainer.logging_steps=1", "dataset.max_examples=16"]
    return ["train", *words, "trainer.max_steps=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """`plain`, and `run`, which all trackers watch and which is continued after its second step."""
    folder = tmp_path_factory.mktemp("runs")
    sparseft(folder, *words, "output_dir=plain")
    tracked = [*words, ALL, "output_dir=run", "trainer.sample_prompts=['2+3=']"]
    first = sparseft(folder, *[word for word in tracked if "max_steps" not in word], "trainer.max_steps=2")
    for name in TRACKED:
        assert f"{name}: " in first.err
    # The first session's rates are those of a run of two steps; the continued one's those of four.
    sparseft(folder, *tracked, "trainer.resume=auto")
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics, each with what trackers are to get of it."""
    kept = []
    for line in metrics(run):
        names = ["eval_loss"] if "eval_loss" in line else NAMES
        kept.append({"step": line["step"], **{name: line[name] for name in names}})
    return kept


def expected(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines(run) if name in line]


def split(name: str) -> str:
    """The chart that transformers' callbacks draw a metric in."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def close(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> None:
    assert [step for step, _ in found] == [step for step, _ in wanted]
    np.testing.assert_allclose([value for _, value in found], [value for _, value in wanted], rtol=1e-6)


def test_training_is_bit_for_bit_the_same(runs: Path, words: list[str], tmp_path: Path) -> None:
    """With dropout, and with all trackers and sample answers, without a break."""
    sparseft(tmp_path, *words, ALL, "output_dir=watched", "trainer.sample_prompts=['2+3=']", "trainer.sample_steps=1")
    own = [path for path in files(tmp_path / "watched") if path.split("/")[0] in TRACKED]
    for path in [*own, "trackers.json", "samples.jsonl"]:
        (tmp_path / "watched" / path).unlink()
    same_end(tmp_path / "watched", runs / "plain")


def test_tensorboard_has_each_line_once(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "run" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for name in (*NAMES, "eval_loss"):
        close([(event.step, event.value) for event in events.Scalars(split(name))], expected(runs / "run", name))
    (picture,) = events.Images("selection")
    assert picture.encoded_image_string.startswith(b"\x89PNG") and picture.step == 0
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    config = texts["args/text_summary"][0].tensor_proto.string_val[0].decode()
    assert "path: " in config and "max_steps: 2" in config
    assert b"eval_loss_after" in texts["summary/text_summary"][-1].tensor_proto.string_val[0]
    assert [event.step for event in texts["samples/text_summary"]] == [0, 2, 4]
    assert b"2+3=" in texts["samples/text_summary"][0].tensor_proto.string_val[0]


def test_a_resumed_run_hides_what_comes_again(words: list[str], tmp_path: Path) -> None:
    """TensorBoard: a session that logged beyond its last checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = [*words, "trainer.report_to=tensorboard", "output_dir=run"]
    sparseft(tmp_path, *one)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    sparseft(tmp_path, *one, "trainer.resume=auto")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def logged(content: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    place, parts = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<4xHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_each_line_once_and_goes_on_under_one_id(runs: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[Any]] = {}
    ids, summaries, config = set(), {}, {}
    for file in sorted((runs / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in logged(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "config":
                config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "summary":
                summaries |= {(item.key or item.nested_key[0]): item.value_json for item in record.summary.update}
            elif kind == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name, value in row.items():
                    found.setdefault(name, []).append((row.get("train/global_step"), value))
    ((identity, project, name),) = ids
    assert (project, name) == ("sparseft", "run")
    assert json.loads((runs / "run" / "trackers.json").read_text())["wandb"] == {"id": identity}
    for name in (*NAMES, "eval_loss"):
        close(found[split(name)], expected(runs / "run", name))
    assert config["trainer"]["learning_rate"] == 1e-2
    assert float(summaries["eval_loss_after"]) == summary(runs / "run")["eval_loss_after"]
    assert found["selection/_type"] == [(0, "image-file")]
    assert found["samples/_type"] == [(step, "table-file") for step in (0, 2, 4)]


def test_mlflow_has_each_line_once_in_one_run(runs: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((runs / "run" / "mlflow" / "store").resolve().as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'sparseft'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    for name in (*NAMES, "eval_loss"):
        history = client.get_metric_history(run.info.run_id, name)
        close([(metric.step, metric.value) for metric in history], expected(runs / "run", name))
    assert run.data.params["trainer.learning_rate"] == "0.01"
    assert run.data.metrics["summary/eval_loss_after"] == summary(runs / "run")["eval_loss_after"]
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"selection-0.png", "summary.json", "samples-0.md", "samples-2.md", "samples-4.md"}


def test_trackio_has_each_line_once_in_one_run(runs: Path) -> None:
    with sqlite3.connect(runs / "run" / "trackio" / "sparseft.db") as database:
        rows = [(step, json.loads(row)) for step, row in database.execute("select step, metrics from metrics")]
        found = set(database.execute("select run_id, run_name from metrics"))
        (config,) = database.execute("select config from configs").fetchone()
    ((_, name),) = found
    assert name == "run" and json.loads(config)["trainer"]["learning_rate"] == 1e-2
    for name in (*NAMES, "eval_loss"):
        close([(step, row[split(name)]) for step, row in rows if split(name) in row], expected(runs / "run", name))
    seen = {name: (step, value) for step, row in rows for name, value in row.items()}
    assert seen["summary/eval_loss_after"] == (4, summary(runs / "run")["eval_loss_after"])
    assert seen["selection"][1]["_type"] == "trackio.image" and "samples" in seen


def test_a_tracker_that_a_continued_run_begins_with_has_all_of_it(words: list[str], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    short = [word for word in words if "max_steps" not in word]
    sparseft(tmp_path, *short, "trainer.max_steps=2", "output_dir=run")
    sparseft(tmp_path, *words, "output_dir=run", "trainer.resume=auto", "trainer.report_to=mlflow")
    client = MlflowClient((tmp_path / "run" / "mlflow" / "store").resolve().as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'sparseft'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["trainer.learning_rate"] == "0.01"
    assert "selection-2.png" in {item.path for item in client.list_artifacts(run.info.run_id)}


def test_runs_of_one_name_in_a_shared_place_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracks"))
    args = types.SimpleNamespace(run_name="run", to_dict=dict)
    known: dict[str, dict[str, Any]] = {}
    for step, name in enumerate(["a", "b", "a"]):
        tracker = trackers.Trackio(tmp_path / name)
        known[name] = tracker.begin(args, None, known.get(name), step)
        tracker.log({"loss": 1.0}, step)
        tracker.end(failed=False)
    with sqlite3.connect(tmp_path / "tracks" / "sparseft.db") as database:
        found = {
            step: (run, name) for step, run, name in database.execute("select step, run_id, run_name from metrics")
        }
    assert found[0] == found[2] != found[1] and found[0][1] == known["a"]["name"]
    assert all(name.startswith("run-") for _, name in found.values())


def test_the_environment_says_where(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {name: tmp_path / name for name in ("boards", "lake", "flow", "tracks")}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(places["boards"]))
    monkeypatch.setenv("WANDB_DIR", str(places["lake"]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", places["flow"].as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("TRACKIO_DIR", str(places["tracks"]))
    places["lake"].mkdir()
    sparseft(tmp_path, *[word for word in words if "max_steps" not in word], "trainer.max_steps=1", ALL, "output_dir=r")
    assert list(places["boards"].glob("events*")) and list(places["lake"].glob("wandb/offline-run-*"))
    assert list(places["flow"].rglob("loss")) and (places["tracks"] / "sparseft.db").is_file()
    assert not any((tmp_path / "r" / name).exists() for name in TRACKED)


def test_overwriting_takes_trackers_with_it_and_nothing_else(words: list[str], tmp_path: Path) -> None:
    short = [*[word for word in words if "max_steps" not in word], "trainer.max_steps=1", "output_dir=run"]
    sparseft(tmp_path, *short, "trainer.report_to=tensorboard")
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "mine").write_text("no tracker of this run wrote it")
    sparseft(tmp_path, *short, "overwrite=true")
    assert not (tmp_path / "run" / "tensorboard").exists() and not (tmp_path / "run" / "trackers.json").exists()
    assert (tmp_path / "run" / "wandb" / "mine").is_file()


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("[tensorboard,wandbb]", ["trainer.report_to=wandbb", "tensorboard, wandb, mlflow, trackio", "'wandb'"]),
        ("comet", ["trainer.report_to=comet", "tensorboard"]),
        ("3", ["trainer.report_to=3", "a list"]),
    ],
)
def test_an_unknown_tracker_is_refused(given: str, parts: list[str], words: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, *words, f"trainer.report_to={given}", "output_dir=run")
    assert all(part in message for part in parts), message
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused(tmp_path, *words, "trainer.report_to=[tensorboard,wandb]", "output_dir=run")
    assert message == "trainer.report_to=wandb: the package wandb is not installed; pip install 'sparseft[wandb]'."
    assert not list(tmp_path.iterdir())


def test_mlflow_that_is_turned_off_is_refused_before_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "True")
    message = refused(tmp_path, *words, "trainer.report_to=mlflow", "output_dir=run")
    assert message == "trainer.report_to=mlflow: DISABLE_MLFLOW_INTEGRATION=True turns it off; unset that."
    assert not list(tmp_path.iterdir())


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As W&B leaves one in the working directory."""
    (tmp_path / "tracked_folder" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="tracked_folder is not installed"):
        trackers.check(["tracked_folder"])


def test_a_tracker_that_fails_on_the_way_is_left_out(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, logs: Any, step: int) -> None:
        raise ConnectionError("no route to\nhost")

    monkeypatch.setattr(trackers.Trackio, "log", fail)
    done = sparseft(tmp_path, *words, "trainer.report_to=[trackio,tensorboard]", "output_dir=run")
    said = "trackio: no route to host; the run goes on without it"
    assert done.err.count(said) == 1 and said in summary(tmp_path / "run")["warnings"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_tracker_that_cannot_start_ends_the_run_before_it_trains(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    def fail(*_: Any) -> None:
        raise OSError("refused")

    monkeypatch.setattr(trackers.MLflow, "begin", fail)
    monkeypatch.setattr(trackers.TensorBoard, "end", lambda self, failed: ended.append(failed))
    done = sparseft(tmp_path, *words, "trainer.report_to=[tensorboard,mlflow]", "output_dir=run", code=1)
    assert "trainer.report_to=mlflow: it cannot be started: refused." in done.err
    assert ended == [True] and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at https://alice:s3cret@mlflow.corp/api/log?write_token=abc; again", "at https://mlflow.corp/api/log; again"),
        (
            "Max retries exceeded with url: /log?write_token=abc (no way)",
            "Max retries exceeded with url: /log (no way)",
        ),
        (
            "postgresql+psycopg2://alice:s3/c?r@e#t@db.corp:5432/runs?sslmode=x",
            "postgresql+psycopg2://db.corp:5432/runs",
        ),
        ("(https://t0ken@host/x?SECRET).", "(https://host/x)"),
        ("https://host:8080/x, and me@host. Why?", "https://host:8080/x, and me@host. Why?"),
        # A port is no password, whatever comes later.
        *(
            (same, same)
            for same in (
                "https://mlflow.corp:8080/me@host/v",
                "https://localhost:8080#me@host",
                "https://127.0.0.1:/me@host",
                "s3://store/me@v",
                "http://[::1]:8080/me@host",
                "http://[::1]/me@host",
                "https://host/a:b@v",
                "https://host:8080/x me@host",
            )
        ),
        ("http://a:1/x,http://alice:s3cret@b/y", "http://a:1/x,http://b/y"),
        ("http://alice:s3/t@a/x,http://alice:p@ss@b:1/y", "http://a/x,http://b:1/y"),
        ("https://:s3cret@[::1]:8080/x", "https://[::1]:8080/x"),
        ("https://alice:123456/7@host:80/x", "https://host:80/x"),
        # Where it is not clear what is a password, more is taken out.
        ("http://u:pa@ss/w@h/x", "http://h/x"),
        ("http://u:p://w@h/x", "http://h/x"),
        ("http://u:pass://w:rd@h/x http://h/y", "http://h/x http://h/y"),
        ("http://u:p@h/x,https://v:q@i/y", "http://h/x,https://i/y"),
        ("http://u:12/3@h/x", "http://h/x"),
        ("http://user:12345#x@h/", "http://h/"),
        ("http://me@mlflow.corp:p/w@h/x", "http://h/x"),
        ("http://[name:p/w@h/x", "http://h/x"),
    ],
)
def test_what_an_error_quotes_lets_nobody_in(text: str, told: str, tmp_path: Path) -> None:
    """Warnings go into the summary, and from there into reports and onto model cards."""

    class Failing(trackers.Tracker):
        def summary(self, content: dict[str, Any]) -> None:
            raise ConnectionError(text)

        def end(self, failed: bool) -> None:
            pass

    console.clear_warnings()
    trackers.Trackers({"mlflow": Failing(tmp_path)}).summary({"loss": 1.0})
    assert console.recorded_warnings() == [f"mlflow: {told}; the run goes on without it"]


@pytest.mark.parametrize(
    ("tracker", "variable", "value"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "postgresql://alice:s3cret@db.corp/runs"),
        ("trackio", "TRACKIO_SERVER_URL", "https://trackio.corp/?write_token=s3cret"),
    ],
)
def test_the_log_of_where_it_is_lets_nobody_in(
    tracker: str, variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(variable, value)
    kind = trackers.KINDS[tracker]

    def begin(self: Any, *_: Any) -> dict[str, Any]:
        self.mlflow = types.SimpleNamespace(get_tracking_uri=lambda: value)
        return {}

    monkeypatch.setattr(kind, "begin", begin)
    config: Any = types.SimpleNamespace(to_dict=dict)
    trackers._open(trackers.Trackers({}), tracker, config, types.SimpleNamespace(), None, tmp_path, None, None)
    said = capsys.readouterr().err
    assert f"{tracker}: " in said and ".corp" in said and "s3cret" not in said and "alice" not in said


def test_only_the_first_process_has_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "is_main", lambda: False)
    config: Any = None  # is not even looked at
    with trackers.tracked(config, config, None, tmp_path, None) as found:
        assert not found.opened
        found.log({"step": 1, "loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_evaluations_carry_scores_with_their_errors(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, float], int]] = []

    class Noting(trackers.Tracker):
        def log(self, logs: dict[str, float], step: int) -> None:
            seen.append((logs, step))

    found = trackers.Trackers({"noting": Noting(tmp_path)})
    found.log({"step": 4, "epoch": 1.0, "eval_loss": 2.0, "eval_score": 0.5, "eval_score_stderr": 0.1})
    found.log({"step": 5, "epoch": 1.5, "loss": None, "learning_rate": 1.0})
    assert seen == [
        ({"eval_loss": 2.0, "eval_score": 0.5, "eval_score_stderr": 0.1}, 4),
        ({"epoch": 1.5, "learning_rate": 1.0}, 5),
    ]


# ---- what trains, as a picture ----


@pytest.mark.parametrize(("kind", "method"), [("llama", "s2ft"), ("gpt2", "sylva"), ("llama", "lora")])
def test_the_picture_shows_what_trains(kind: str, method: str, make_model: Any) -> None:
    plain = make_model(kind)
    spec = ModelSpec.of(plain)  # as a run has it, of the model before
    model = attached(plain, method)
    shares = trained_shares(model, spec)
    assert all("." in role and not any(part.isdigit() for part in role.split(".")) for role, _ in shares)
    sizes = dict.fromkeys(shares, 0)
    for name, (rows, columns) in spec.linears.items():
        role = next(role for role, _ in shares if spec.path_of(name).endswith(role))
        sizes[role, spec.layer_of[name]] += rows * columns
    trained = sum(share * sizes[at] for at, share in shares.items())
    if method != "lora":
        assert trained == pytest.approx(sum(layer.trainable_entries for layer in sparse_layers(model).values()))
    else:
        assert trained == pytest.approx(sum(p.numel() for p in model.parameters() if p.requires_grad))
    pixels = draw_shares(shares)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.std() > 10
