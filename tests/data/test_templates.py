"""Templates that write today's date: one day for all of a run."""

from __future__ import annotations

import copy
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.utils import chat_template_utils

from sparseft.bench.trials import Study
from sparseft.compose.run_config import compose, to_yaml
from sparseft.config import BUNDLED_ROOT, DatasetConfig
from sparseft.data import templates
from sparseft.data.loading import load_datasets
from support.data import CHATML
from support.running import refused, sparseft

DATED = "<s>Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML
WORDS = ["dataset=json", "dataset.train_path=chats.jsonl", "trainer.batch_size=2", "trainer.gradient_accumulation=1"]
WORDS += ["trainer.max_length=200", "trainer.save_steps=2", "method=s2ft", "hardware=cpu", "trainer.warmup_steps=0"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the day that it is."""

    def set_to(day: str) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date.fromisoformat(day)

        class Moment(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return datetime.datetime.fromisoformat(day)

        monkeypatch.setattr(templates, "date", Day)
        monkeypatch.setattr("sparseft.bench.trials.date", Day)
        monkeypatch.setattr(chat_template_utils, "datetime", Moment)

    return set_to


def chat(number: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"it is {number}"}]
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose template writes the date, chats, and pairs of them."""
    shutil.copytree(BUNDLED_ROOT / "tiny", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(24)))
    pairs = [{"prompt": [{"role": "user", "content": f"{number}?"}]} for number in range(24)]
    for number, pair in enumerate(pairs):
        for key, answer in (("chosen", number), ("rejected", number + 1)):
            pair[key] = [{"role": "assistant", "content": f"it is {answer}"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def config(run: Path) -> str:
    return (run / "config.yaml").read_text()


def test_a_run_goes_on_on_another_day(folder: Path, clock: Any) -> None:
    clock("2026-01-30")
    words = ["train", "model.path=model", *WORDS, "output_dir=run"]
    sparseft(folder, *words, "trainer.max_steps=2")
    assert "chat_date: '2026-01-30'" in config(folder / "run")
    clock("2026-01-31")
    done = sparseft(folder, *words, "trainer.max_steps=4", "trainer.resume=auto")
    assert "checkpoint-2" in done.err and "chat_date: '2026-01-30'" in config(folder / "run")
    other = refused(folder, *words, "trainer.max_steps=4", "trainer.resume=auto", "dataset.chat_date=2026-01-31")
    assert other.startswith("dataset.chat_date=2026-01-31: the run in 'run' was started with 2026-01-30")


def test_held_out_pairs_of_a_run_are_read_on_another_day(folder: Path, clock: Any) -> None:
    clock("2026-01-30")
    words = [word.replace("chats", "pairs") for word in WORDS if word != "dataset=json"]
    words += ["dataset=preference", "dataset.eval_path=null", "dataset.eval_fraction=0.25", "trainer.max_steps=1"]
    sparseft(folder, "train", "objective=simpo", "model.path=model", *words, "output_dir=run")
    clock("2026-01-31")
    asked = ["eval", "preference", "--run", "run", "eval.compare_base=false"]
    assert sparseft(folder, *asked, "--json").json["tasks"]["preference"]["samples"] == 6


def test_a_benchmarks_runs_have_one_day(folder: Path, clock: Any) -> None:
    def study() -> Study:
        words = ["model.path=model", *WORDS, "trainer.max_steps=1"]
        return Study(compose("train", words, []), words, [], folder / "bench", {"a": []}, lambda config: {})

    clock("2026-01-30")
    made = study().composed([], 0, None)
    assert made.dataset.chat_date == "2026-01-30"
    run = folder / "bench/runs/a-seed0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(made))
    clock("2026-01-31")
    assert study().composed([], 0, None).dataset.chat_date == "2026-01-30"


def test_a_comparison_goes_on_on_another_day(folder: Path, clock: Any) -> None:
    words = ["bench", "quality", "model.path=model", *WORDS, "dataset.eval_fraction=0.25", "trainer.max_steps=1"]
    words += ["bench.variants=['a: trainer.learning_rate=1e-3']", "output_dir=bench"]
    clock("2026-01-30")
    sparseft(folder, *words, "bench.seeds=1")
    clock("2026-01-31")
    done = sparseft(folder, *words, "bench.seeds=2")
    assert "1 of 2 runs are there from before" in done.err
    assert "chat_date: '2026-01-30'" in config(folder / "bench/runs/a-seed1")


def test_the_day_is_in_what_the_template_writes_and_nowhere_else(
    tokenizer: Any, clock: Any, folder: Path, tmp_path: Path
) -> None:
    dated, undated = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    dated.chat_template, undated.chat_template = DATED, CHATML
    chats, texts = str(folder / "chats.jsonl"), tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "completion": "b"}\n')

    def read(tokenizer: Any, path: Any, today: str = "2026-01-31", **settings: Any) -> tuple[str, bool]:
        clock(today)
        config = DatasetConfig(train_path=str(path), eval_fraction=0.0, **settings)
        data = load_datasets(config, tokenizer, max_length=200, seed=0, bundled=False, cache_dir=tmp_path / "cache")
        return tokenizer.decode(data.train[0]["input_ids"]), any("tokens: cached" in note for note in data.notes)

    assert "Today: 31 Jan 2026" in read(dated, chats)[0]
    assert "Today: 05 Feb 2025" in read(dated, chats, chat_date="2025-02-05")[0]
    assert chat_template_utils.datetime.now() == datetime.datetime(2026, 1, 31)
    for tokenizer, path, settings, same in (
        (dated, chats, {}, False),
        (dated, chats, {"chat_date": "2026-01-31"}, True),
        (dated, chats, {"plain_chat": True}, True),
        (dated, texts, {}, True),
        (undated, chats, {}, True),
    ):
        read(tokenizer, path, **settings)
        assert read(tokenizer, path, today="2026-02-01", **settings)[1] is same, (path, settings)


def test_a_day_is_given_as_one(tmp_path: Path) -> None:
    for given in ("20260131", "2026-02-30", "today"):
        assert refused(tmp_path, "data", "x.jsonl", f"dataset.chat_date={given}").startswith(
            f"dataset.chat_date={given}: expected a day as 2026-01-31"
        )
