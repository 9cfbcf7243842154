"""The commonsense and arithmetic sets from the Hugging Face hub, in the words of LLM-Adapters.

Its authors publish test files, not a hub set. Most of them can be had from the original sets on the hub: each record
becomes the instruction that LLM-Adapters made of it. The split is theirs too: where a test split has no public
answers, they test on the validation split. Three arithmetic sets have no such source and need `eval.data_dir`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparseft.data import prompts
from sparseft.errors import UserError
from sparseft.evaluation.tasks import GROUPS

Converted = tuple[str, str]  # (instruction, answer)


@dataclass(frozen=True)
class HubSet:
    """One set on the hub."""

    path: str
    name: str | None
    split: str  # as datasets takes it
    convert: Callable[[dict[str, Any]], Converted]


def _boolq(record: dict[str, Any]) -> Converted:
    return prompts.true_or_false(record["question"]), "true" if record["label"] else "false"


def _piqa(record: dict[str, Any]) -> Converted:
    head = prompts.CHOOSE_SOLUTION + record["goal"]
    texts = [record["sol1"], record["sol2"]]
    return prompts.choose(head, "solution", texts, "\n\n"), f"solution{int(record['label']) + 1}"


def _question(text: str, texts: list[str], number: int) -> Converted:
    """`number` counts the right answer from 0."""
    return prompts.choose(prompts.CHOOSE_ANSWER + text, "answer", texts), f"answer{number + 1}"


def _social_i_qa(record: dict[str, Any]) -> Converted:
    texts = [record[key] for key in ("answerA", "answerB", "answerC")]
    return _question(f"{record['context']} {record['question']}", texts, int(record["label"]) - 1)


def _hellaswag(record: dict[str, Any]) -> Converted:
    head = f"{prompts.CHOOSE_ENDING}{record['activity_label']}: {record['ctx']}"
    return prompts.choose(head, "ending", record["endings"]), f"ending{int(record['label']) + 1}"


def _winogrande(record: dict[str, Any]) -> Converted:
    head = prompts.CHOOSE_OPTION + record["sentence"]
    texts = [record["option1"], record["option2"]]
    # Alone of all, its answer format follows after a space.
    return prompts.choose(head, "option", texts, before_format=" "), f"option{int(record['answer'])}"


def _ai2(key: str) -> Callable[[dict[str, Any]], Converted]:
    """ARC and OpenBookQA: the choices' labels are letters in some records and numbers in others."""

    def convert(record: dict[str, Any]) -> Converted:
        choices = record["choices"]
        return _question(record[key], choices["text"], choices["label"].index(record["answerKey"].strip()))

    return convert


def _gsm8k(record: dict[str, Any]) -> Converted:
    return record["question"], record["answer"].rsplit("####", 1)[-1].strip()


def _aqua(record: dict[str, Any]) -> Converted:
    # The options stand as "A)21".
    options = [(option[0], option[2:].strip()) for option in record["options"]]
    return prompts.answer_choices(record["question"], options), record["correct"]


def _svamp(record: dict[str, Any]) -> Converted:
    body = record["Body"].strip()
    return f"{body}{'' if body.endswith('.') else '.'} {record['Question'].strip()}", str(record["Answer"])


def _multi_arith(record: dict[str, Any]) -> Converted:
    return record["question"].strip(), str(record["final_ans"])


SOURCES = {
    "boolq": HubSet("aps/super_glue", "boolq", "validation", _boolq),
    "piqa": HubSet("baber/piqa", None, "validation", _piqa),
    "social_i_qa": HubSet("lighteval/siqa", None, "validation", _social_i_qa),
    "hellaswag": HubSet("Rowan/hellaswag", None, "validation", _hellaswag),
    "winogrande": HubSet("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "ARC-Easy": HubSet("allenai/ai2_arc", "ARC-Easy", "test", _ai2("question")),
    "ARC-Challenge": HubSet("allenai/ai2_arc", "ARC-Challenge", "test", _ai2("question")),
    "openbookqa": HubSet("allenai/openbookqa", "main", "test", _ai2("question_stem")),
    "gsm8k": HubSet("openai/gsm8k", "main", "test", _gsm8k),
    "AQuA": HubSet("deepmind/aqua_rat", "raw", "test", _aqua),
    "SVAMP": HubSet("ChilleD/SVAMP", None, "train+test", _svamp),  # LLM-Adapters tests on all of it
    "MultiArith": HubSet("ChilleD/MultiArith", None, "train+test", _multi_arith),
}


def select(requested: list[str], split: str) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """`({requested name: {task: hub id}}, {group: [tasks without a source]})`; UserError for a task without one."""
    if split == "validation":
        raise UserError(
            f"eval.split=validation: the hub's validation splits are what {', '.join(requested)} test on; set "
            "eval.data_dir=FOLDER with FOLDER/<task>/validation.json in the LLM-Adapters layout."
        )
    selected, missing = {}, {}
    for name in requested:
        members = GROUPS.get(name, (name,))
        selected[name] = {task: SOURCES[task].path for task in members if task in SOURCES}
        absent = [task for task in members if task not in SOURCES]
        if not selected[name]:
            raise UserError(
                f"The test data of {name} is on no hub: set eval.data_dir=FOLDER with FOLDER/{name}/test.json in the "
                "LLM-Adapters layout (github.com/AGI-Edgerunners/LLM-Adapters, dataset/)."
            )
        if absent:
            missing[name] = absent
    return selected, missing


def load(task: str) -> list[dict[str, str]]:
    """The records of a task, `{"instruction", "answer"}`, from the hub or its cache."""
    import datasets

    source = SOURCES[task]
    try:
        records = datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Offline, no such cache, or the hub cannot be reached: all three are for the user to settle.
        raise UserError(
            f"{task} ({source.path}) is neither in the Hugging Face cache nor could it be fetched "
            f"({type(error).__name__}); set eval.data_dir=FOLDER with FOLDER/{task}/test.json in the LLM-Adapters "
            "layout."
        ) from error
    return [dict(zip(("instruction", "answer"), source.convert(record), strict=True)) for record in records]
