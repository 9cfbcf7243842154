"""The task files run by plain lm-eval, and the hub's records in the words of LLM-Adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseft.config import EvalConfig
from sparseft.data.prompts import mmlu_header
from sparseft.errors import UserError
from sparseft.evaluation import llm_adapters, mmlu
from sparseft.evaluation import llm_adapters as hub
from sparseft.evaluation.llm_adapters import GROUPS, group_of
from sparseft.evaluation.mmlu import MMLU_CATEGORIES, MMLU_SUBJECTS
from sparseft.evaluation.run import evaluate, prepare
from sparseft.evaluation.task_files import FOLDER, common
from support.places import SHARED

LABELS = {"boolq": ("true", "false"), "piqa": ("solution1", "solution2"), "hellaswag": ("ending1", "ending4")}
LABELS |= {"winogrande": ("option1", "option2"), "AQuA": ("A", "E")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions for every task of the two groups, and MMLU's subjects of one category."""
    folder = tmp_path_factory.mktemp("data")
    for group, members in GROUPS.items():
        for task in members:
            labels = LABELS.get(task, ("answer1", "answer2") if group == "commonsense" else ("7", "1,234.5"))
            records = [{"instruction": f"{task} {n}?", "input": "", "output": "", "answer": labels[n % 2]}
                       for n in range(3)]  # fmt: skip
            (folder / group / task).mkdir(parents=True)
            (folder / group / task / "test.json").write_text(json.dumps(records))
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        for place, subject in enumerate(MMLU_CATEGORIES["other"]):
            rows = "".join(
                f"{subject} {n}?,a,b,c,d,{'ABCD'[(n + place) % 4]}\n" for n in range(5 if split == "dev" else 3)
            )
            (folder / "mmlu" / split / f"{subject}_{split}.csv").write_text(rows)
    return folder


def plain_lm_eval(model: Any, tokenizer: Any, names: list[str], data: Path) -> dict[str, Any]:
    """lm-eval by itself, as its command line runs it: `--include_path`, `--metadata`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    metadata = {"data_dir": str(data), "split": "test"}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, backend="causal")
    return simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_plain_lm_eval_gives_the_same_results(make_model: Any, tokenizer: Any, data: Path) -> None:
    """The same prompts, answers and scores, task by task and in the groups."""
    model = make_model("llama", seed=3, vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 2048
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 2048
    groups = ["commonsense", "arithmetic", "mmlu_other"]
    ours = evaluate(model, tokenizer, prepare(groups, EvalConfig(batch_size=2), data_dir=str(data)))
    theirs = plain_lm_eval(model, tokenizer, [f"sparseft_{name}" for name in groups], data)
    assert {f"sparseft_{name}" for name in ours["samples"]} == set(theirs["samples"])
    for name, records in ours["samples"].items():
        samples = sorted(theirs["samples"][f"sparseft_{name}"], key=lambda sample: sample["doc_id"])
        for record, sample in zip(records, samples, strict=True):
            assert record["prompt"] == sample["arguments"][0][0]
            assert float(record["metrics"]["acc"]) == float(sample["acc"])
            if "loglikelihoods" in record:
                scores = [response[0] for response in sample["filtered_resps"]]
                assert record["loglikelihoods"] == pytest.approx(scores, abs=1e-4)
            else:
                assert record["response"] == sample["resps"][0][0]
    for name in groups:
        key = "acc,none" if name.startswith("mmlu") else "acc,extract"
        assert theirs["results"][f"sparseft_{name}"][key] == pytest.approx(ours["tasks"][name]["accuracy"])


def test_there_is_a_file_for_every_task() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    files = {path: yaml.load(path.read_text(), Loader) for path in FOLDER.rglob("*.yaml") if path.name[0] != "_"}
    tasks = {content["task"]: content for content in files.values() if "group" not in content}
    groups = {content["group"]: content["task"] for content in files.values() if "group" in content}
    members = [task for group in GROUPS.values() for task in group]
    assert set(tasks) == {f"sparseft_{name}" for name in [*members, *(f"mmlu_{s}" for s in MMLU_SUBJECTS)]}
    for name, content in tasks.items():
        name = name.removeprefix("sparseft_")
        if name.startswith("mmlu_"):
            subject = name.removeprefix("mmlu_")
            assert content["dataset_kwargs"] == {"subject": subject}
            assert content["description"] == mmlu_header(subject)
        else:
            assert content["dataset_kwargs"] == {"task": name}
            assert content["include"] == ("_arithmetic.yaml" if group_of(name) == "arithmetic" else "_common.yaml")
    assert {name: {task.removeprefix("sparseft_") for task in found} for name, found in groups.items()} == {
        **{f"sparseft_{group}": set(names) for group, names in GROUPS.items()},
        "sparseft_mmlu": {f"mmlu_{category}" for category in MMLU_CATEGORIES},
        **{f"sparseft_mmlu_{c}": {f"mmlu_{s}" for s in subjects} for c, subjects in MMLU_CATEGORIES.items()},
    }


def test_shared_settings_are_the_callers_own_copy() -> None:
    first = common("llm_adapters", "_arithmetic")
    assert first["generation_kwargs"]["max_gen_toks"] == 256 and callable(first["doc_to_text"])
    first["generation_kwargs"]["max_gen_toks"] = 1
    assert common("llm_adapters", "_arithmetic")["generation_kwargs"]["max_gen_toks"] == 256
    assert common("llm_adapters")["generation_kwargs"]["max_gen_toks"] == llm_adapters.MAX_NEW_TOKENS


# ---- the hub ----

# A record of each set, with the fields that its page on the hub shows, and what LLM-Adapters published of it.
CHOICES = {"text": ["decrease", "increase", "remain the same"], "label": ["A", "B", "C"]}
PUBLISHED = {
    "boolq": (
        {"question": "does ethanol take more energy make that produces", "passage": "…", "label": 0},
        "Please answer the following question with true or false, question: does ethanol take more energy make that "
        "produces?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "Prevent bottles from rolling in fridge.", "sol1": "Clip.", "sol2": "Staple remover.", "label": 0},
        "Please choose the correct solution to the question: Prevent bottles from rolling in fridge.\n\nSolution1: "
        "Clip.\n\nSolution2: Staple remover.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        {"context": "Carson relocated.", "question": "How is he?", "answerA": "x", "answerB": "y", "answerC": "z",
         "label": "3"},
        "Please choose the correct answer to the question: Carson relocated. How is he?\n\nAnswer1: x Answer2: y "
        "Answer3: z\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Playing drums", "ctx": "A man", "endings": ["a.", "b.", "c.", "d."], "label": "3"},
        "Please choose the correct ending to complete the given sentence: Playing drums: A man\n\nEnding1: a. "
        "Ending2: b. Ending3: c. Ending4: d.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
         "option1": "Sarah", "option2": "Maria", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was a much better "
        "surgeon than Maria so _ always got the easier cases.\n\nOption1: Sarah Option2: Maria Answer format: "
        "option1/option2",
        "option2",
    ),
    "ARC-Easy": (
        {"question": "the height of the water will", "choices": CHOICES, "answerKey": "B"},
        "Please choose the correct answer to the question: the height of the water will\n\nAnswer1: decrease Answer2: "
        "increase Answer3: remain the same\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "openbookqa": (
        {"question_stem": "fog is around", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1 "},
        "Please choose the correct answer to the question: fog is around\n\nAnswer1: a Answer2: b\n\nAnswer format: "
        "answer1/answer2",
        "answer1",
    ),
    "gsm8k": ({"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,204"}, "How many?", "1204.0"),
    "AQuA": (
        {"question": "What is the perimeter?", "options": ["A)60 m", "B)61 m", "C)62 m", "D)63 m", "E)64 m"],
         "rationale": "…", "correct": "C"},
        "What is the perimeter? Answer Choices: (A) 60 m (B) 61 m (C) 62 m (D) 63 m (E) 64 m",
        "C",
    ),
    "SVAMP": (
        {"Body": "If he had 32 crackers and 98 cakes initially", "Question": "How many did each eat?", "Answer": "8.0"},
        "If he had 32 crackers and 98 cakes initially. How many did each eat?",
        "8.0",
    ),
    "MultiArith": ({"question": " How much? ", "final_ans": "8"}, "How much?", "8.0"),
}  # fmt: skip
PUBLISHED["ARC-Challenge"] = PUBLISHED["ARC-Easy"]


@pytest.mark.parametrize("load", [lambda: hub.load_from_hub("boolq"), lambda: mmlu._from_hub("anatomy")])
def test_why_nothing_came_from_the_hub_is_said(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no missing network."""
    import datasets

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(UserError, match="No space left on device"):
        load()


@pytest.mark.parametrize("task", hub.SOURCES)
def test_the_hubs_records_in_the_words_of_llm_adapters(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    record, instruction, answer = PUBLISHED[task]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: asked.append((*words, more)) or [record])
    (doc,) = llm_adapters.load_records(task)["test"]
    assert (doc["instruction"], doc["answer"]) == (instruction, answer)
    source = hub.SOURCES[task]
    assert asked == [(source.path, source.name, {"split": source.split})]
    plan = prepare([task], EvalConfig(), data_dir=None)
    assert plan.facts[task] == {"data": source.path, "split": "test"}


DATA = SHARED / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the project")
@pytest.mark.parametrize("task", ["boolq", "piqa", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"])
def test_the_words_are_those_of_the_published_files(task: str) -> None:
    """Taken apart into the fields of the original set and put together again, every published question is the same."""
    import re

    records = json.loads((DATA / "commonsense" / task / "test.json").read_text())
    for record in records:
        text = record["instruction"]
        number = int(record["answer"][-1]) if record["answer"][-1].isdigit() else 0
        head = text.split("question: " if task != "winogrande" else "sentence: ", 1)[1]
        if task == "boolq":
            fields: dict[str, Any] = {"question": head.removesuffix("?\n\nAnswer format: true/false")}
            fields["label"] = int(record["answer"] == "true")
        elif task == "piqa":
            goal, one, two = re.fullmatch(
                r"(?s)(.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\nAnswer f.*", head
            ).groups()
            fields = {"goal": goal, "sol1": one, "sol2": two, "label": number - 1}
        elif task == "winogrande":
            sentence, one, two = re.fullmatch(r"(?s)(.*)\n\nOption1: (.*) Option2: (.*) Answer f.*", head).groups()
            fields = {"sentence": sentence, "option1": one, "option2": two, "answer": str(number)}
        else:
            question, rest = head.rsplit("\n\nAnswer1: ", 1)
            texts = re.split(r" Answer[2-5]: ", rest.rsplit("\n\nAnswer format", 1)[0])
            choices = {"text": texts, "label": "ABCDE"[: len(texts)]}
            fields = {
                "question": question,
                "question_stem": question,
                "choices": choices,
                "answerKey": "ABCDE"[number - 1],
            }
        assert hub.SOURCES[task].convert(fields) == (text, record["answer"])


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        (["AddSub"], {}, "AddSub is on no hub: set eval.data_dir=FOLDER"),
        (["boolq"], {"split": "validation"}, "eval.split=validation: the hub's validation splits"),
        (["gsm8k"], {}, "gsm8k .openai/gsm8k. is neither in the Hugging Face cache.*eval.data_dir=FOLDER"),
    ],
)
def test_sets_that_the_hub_cannot_give(
    names: list[str], settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=expected):
        prepare(names, EvalConfig(**settings), data_dir=None)


def test_a_group_of_the_hub_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    by_path = {source.path: PUBLISHED[task][0] for task, source in hub.SOURCES.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **__: [by_path[path]])
    plan = prepare(["arithmetic"], EvalConfig(), data_dir=None)
    assert plan.facts["arithmetic"]["missing"] == ["AddSub", "SingleEq", "mawps"]
    assert plan.warnings == ["arithmetic: no test data of AddSub, SingleEq, mawps in 'hub'."]


@pytest.mark.parametrize("name", ["_common", "_arithmetic"])
@pytest.mark.parametrize(
    "more", ["### Response:\nThe answer is 9", "### Instruction:\nHow many are 9?\n\n### Response:\n9"]
)
def test_an_example_that_is_made_up_after_the_answer_does_not_count(name: str, more: str) -> None:
    """LLM-Adapters' own evaluation cuts at the next `### Response:`."""
    from lm_eval.models.utils import postprocess_generated_text

    stop = common("llm_adapters", name)["generation_kwargs"]["until"]
    text = postprocess_generated_text(f"So it is 7.\n\n{more}", stop, None)
    assert llm_adapters.extract("gsm8k", text) == 7
