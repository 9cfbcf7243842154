"""What an evaluation costs and touches: operations of an adapter, widths of batches, the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparseft.config import EvalConfig
from sparseft.data.prompts import alpaca_prompt
from sparseft.data.records import Records
from sparseft.evaluation.run import evaluate, prepare
from sparseft.evaluation.target import find_target, score_both
from support.data import convert
from support.places import ROOT
from support.running import METHODS, on, sparseft, write_data


class Operations(TorchDispatchMode):
    """Counts every operation that reaches a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def products(operations: Counter[str]) -> int:
    """Matrix products; a linear layer is one `mm` or, for an input of odd strides, one `bmm`."""
    return sum(operations[f"aten.{name}.default"] for name in ("mm", "bmm", "addmm"))


def questions(folder: Path, count: int = 5) -> Path:
    """A commonsense task whose prompts have very different lengths, and one of MMLU."""
    (folder / "boolq").mkdir(parents=True)
    records = [{"instruction": "long " * (1 + 7 * (n * 5 % count)) + "?", "input": "", "output": "", "answer": "true"}
               for n in range(count)]  # fmt: skip
    (folder / "boolq" / "test.json").write_text(json.dumps(records))
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        rows = "".join(f"Is it {n}?,yes,no,maybe,never,{'ABCD'[n % 4]}\n" for n in range(4))
        (folder / "mmlu" / split / f"anatomy_{split}.csv").write_text(rows)
    return folder


@pytest.mark.parametrize("method", ["s2ft", "sylva", "lora", "dora"])
def test_an_adapter_costs_what_the_merged_model_costs(method: str, tmp_path: Path, model_folder: Any) -> None:
    """As many matrix products a token, scoring and generating, as a plain model of the same shapes: it is merged."""
    from sparseft.compose.run_config import compose
    from sparseft.models.loading import load_model, load_tokenizer

    data = write_data(tmp_path)
    sparseft(
        tmp_path, "train", *on(model_folder(), data["json"]), *METHODS[method], "trainer.max_steps=1",
        f"output_dir={tmp_path}/run",
    )  # fmt: skip
    config = compose("eval", ["eval.compare_base=false", "hardware=cpu"])
    target = find_target(config, run=str(tmp_path / "run"), adapter=None, base=False)
    folder = questions(tmp_path / "data")
    settings = EvalConfig(batch_size=2, max_new_tokens=4, shots=0)
    counted = []

    def score(model: Any, tokenizer: Any) -> dict[str, Any]:
        plan = prepare(["boolq", "mmlu_anatomy"], settings, data_dir=str(folder))
        evaluate(model, tokenizer, plan)  # whatever happens only once
        with FlopCounterMode(display=False) as flops, Operations() as operations:
            outcome = evaluate(model, tokenizer, plan)
        counted.append((flops.get_total_flops(), operations.counts))
        return outcome

    score_both(target, config, score)
    score(load_model(target.model, torch.device("cpu")).eval(), load_tokenizer(target.model))
    (flops, operations), (_, plain_operations) = counted
    assert flops > 1e6
    # The answers may be longer or shorter than the untrained model's: products for each token read.
    passes = operations["aten.embedding.default"] / plain_operations["aten.embedding.default"]
    assert products(operations) == pytest.approx(passes * products(plain_operations))


def test_batches_hold_prompts_of_like_length_and_use_the_cache(tmp_path: Path, make_model: Any, tokenizer: Any) -> None:
    """The longest first, so that memory runs out at once or never; after its prompt a row reads one token a step."""
    folder = questions(tmp_path / "data", 12)
    model = make_model("llama", vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 2048
    model.generation_config.eos_token_id = None
    read: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(tuple(inputs[0].shape)))
    settings = EvalConfig(batch_size=3, max_new_tokens=4)
    outcome = evaluate(model, tokenizer, prepare(["boolq"], settings, data_dir=str(folder)))
    lengths = sorted(
        (len(tokenizer(record["prompt"]).input_ids) for record in outcome["samples"]["boolq"]), reverse=True
    )
    prompts = [shape for shape in read if shape[1] > 1]
    limit = outcome["max_length"]
    assert prompts == [(3, min(lengths[start], limit)) for start in range(0, 12, 3)]
    assert read.count((3, 1)) >= 4 * (4 - 2) and all(shape[1] == 1 or shape in prompts for shape in read)


@pytest.mark.parametrize(
    ("instruction", "given"),
    [("Is it?", ""), ("Add {a} and %s.", "  3\n4 "), ("  Ärger\t“quoted”\n\n### Input:", ""), ("x", "0")],
)
def test_prompts_of_training_and_evaluation_are_the_same_bytes(instruction: str, given: str, tmp_path: Path) -> None:
    """Of every task of both groups: what training masks is what evaluation asks."""
    from sparseft.evaluation.llm_adapters import ARITHMETIC, COMMONSENSE

    record = {"instruction": instruction, "input": given, "output": "so", "answer": "7"}
    (example,) = convert(Records([record], "test", numbers=[1]), "alpaca")
    labels = dict.fromkeys(COMMONSENSE, "answer1") | dict.fromkeys(ARITHMETIC, "7")
    labels |= {"boolq": "true", "piqa": "solution1", "hellaswag": "ending1", "winogrande": "option1", "AQuA": "A"}
    for task, label in labels.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.json").write_text(json.dumps([record | {"answer": label}]))
    plan = prepare([*labels], EvalConfig(), data_dir=str(tmp_path))
    for task in labels:
        built = plan.tasks[task]
        built.build_all_requests()
        (request,) = built.instances
        assert request.args[0] == example.segments[0][0] == alpaca_prompt(instruction, given)
        assert request.args[0].encode() == "".join(text for text, learnt in example.segments if not learnt).encode()


def test_nothing_is_asked_of_the_network(tmp_path: Path, model_folder: Any) -> None:
    """With a model and data in folders: every way out of the process is closed, and nothing tries one.

    In a process of its own and without HF_HUB_OFFLINE, as on a machine that happens to have no network.
    """
    questions(tmp_path / "data")
    code = f"""
        import socket
        def closed(*words, **more):
            print("NETWORK", words, flush=True)
            raise OSError("no network")
        for name in ("connect", "connect_ex", "sendto"):
            setattr(socket.socket, name, closed)
        socket.getaddrinfo = socket.create_connection = closed
        from sparseft.cli.app import main
        code = main(["eval", "boolq", "mmlu", "--base", "model.path={model_folder()}", "eval.data_dir=data",
                     "--shots=0", "--limit=2", "eval.max_new_tokens=2", "output_dir=out"])
        print("CODE", code)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "CODE 0" in done.stdout, done.stdout + done.stderr
    assert "NETWORK" not in done.stdout
