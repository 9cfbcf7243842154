"""The commonsense and arithmetic sets of LLM-Adapters (Hu et al. 2023) as lm-eval tasks, as S2FT evaluates them.

Zero-shot: the Alpaca prompt of training, a generated answer (greedy or beams), and a verdict on its text. Commonsense:
the first match of the task's pattern equals the label. Arithmetic: the last number lies within 1e-3 of the label; in
AQuA the first capital A to E is the label. Data: `<task>/test.json`, an array of records with `instruction`, `input`,
`output`, `answer`.

Its authors publish test files, not a hub set. Most of them can be had from the original sets on the hub: each record
becomes the instruction that LLM-Adapters made of it (`SOURCES`). The split is theirs too: where a test split has no
public answers, they test on the validation split. Three arithmetic sets have no such source and need `eval.data_dir`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.data import prompts
from sparseft.data.prompts import alpaca_prompt
from sparseft.errors import UserError, reason_of, shown
from sparseft.evaluation.task_files import common
from sparseft.files.untrusted import read_json, why

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


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


def load_from_hub(task: str) -> list[dict[str, str]]:
    """The records of a task, `{"instruction", "answer"}`, from the hub or its cache."""
    import datasets

    source = SOURCES[task]
    try:
        records = datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Offline, no such cache, or the hub cannot be reached: all three are for the user to settle.
        raise UserError(
            f"{task} ({source.path}) is neither in the Hugging Face cache nor could it be fetched "
            f"({reason_of(error)}); set eval.data_dir=FOLDER with FOLDER/{task}/test.json in the LLM-Adapters "
            "layout."
        ) from error
    return [dict(zip(("instruction", "answer"), source.convert(record), strict=True)) for record in records]


COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)
ARITHMETIC = ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps")
GROUPS = {"commonsense": COMMONSENSE, "arithmetic": ARITHMETIC}

FILES = {"test": ("test.json",), "validation": ("validation.json", "val.json")}
FILES["any"] = (*FILES["test"], *FILES["validation"])  # the first that is there
TOLERANCE = 1e-3  # of a number, absolute
MAX_NEW_TOKENS = 32  # of an answer
ARITHMETIC_TOKENS = 256  # of one of arithmetic, where the reasoning comes before the number

_ANSWER, _LETTER = re.compile(r"answer[1-5]"), re.compile(r"[A-E]")
PATTERNS = {
    "boolq": re.compile(r"true|false"),
    "piqa": re.compile(r"solution[12]"),
    "social_i_qa": _ANSWER,
    "hellaswag": re.compile(r"ending[1-4]"),
    "winogrande": re.compile(r"option[12]"),
    "ARC-Easy": _ANSWER,
    "ARC-Challenge": _ANSWER,
    "openbookqa": _ANSWER,
    "AQuA": _LETTER,
}
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def group_of(name: str) -> str | None:
    """`commonsense` or `arithmetic` for one of their members, else None."""
    return next((group for group, members in GROUPS.items() if name in members), None)


def max_new_tokens(task: str) -> int:
    """Tokens of an answer, where `eval.max_new_tokens` says nothing else."""
    return ARITHMETIC_TOKENS if task in ARITHMETIC else MAX_NEW_TOKENS


def last_number(text: str) -> float | None:
    """The last number in `text`, or None. Thousands separators and `$` go first: `-$1,234.50.` is -1234.5."""
    numbers = _NUMBER.findall(text.replace(",", "").replace("$", ""))
    return float(numbers[-1]) if numbers else None


def extract(task: str, text: str) -> str | float | None:
    """The answer that a generated `text` gives: the first match of the task's pattern (case matters, as in the
    published protocol), or the last number; None where it gives none."""
    pattern = PATTERNS.get(task)
    if pattern is None:
        return last_number(text)
    found = pattern.search(text)
    return found.group() if found else None


def is_correct(answer: str | float | None, label: str) -> bool:
    """Whether an extracted answer is the label; numbers within 1e-3."""
    if answer is None:
        return False
    if isinstance(answer, str):
        return answer == label
    # Huge generated numbers overflow to inf, whose difference to a label is inf: wrong, as it should be.
    return abs(answer - float(label)) <= TOLERANCE


def find_file(task: str, split: str, data_dir: str | Path) -> Path | None:
    """The task's file of the split under `<data_dir>/<task>` or `<data_dir>/<group>/<task>`, or None."""
    root = Path(data_dir).expanduser()
    for folder in (root / task, root / str(group_of(task)) / task):
        for name in FILES[split]:
            if (folder / name).is_file():
                return folder / name
    return None


def select_files(requested: list[str], split: str, data_dir: str) -> tuple[dict[str, dict[str, Path]], dict]:
    """`({requested name: {task: file}}, {group: [tasks without a file]})`.

    A group needs one of its members' files, a task its own: UserError naming the folder and the layout otherwise.
    """
    selected: dict[str, dict[str, Path]] = {}
    missing: dict[str, list[str]] = {}
    for name in requested:
        members = GROUPS.get(name, (name,))
        files = {task: find_file(task, split, data_dir) for task in members}
        selected[name] = {task: path for task, path in files.items() if path}
        absent = [task for task, path in files.items() if not path]
        if not selected[name]:
            raise UserError(_no_data(name, members, split, data_dir))
        if absent:
            missing[name] = absent
    return selected, missing


def select_sources(requested: list[str], split: str) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
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


def _no_data(name: str, members: tuple[str, ...], split: str, data_dir: str) -> str:
    group = group_of(members[0])
    task = name if name in members else f"<{name} task>"
    file = " or ".join(FILES[split])
    there = [other for other in ("test", "validation") if any(find_file(member, other, data_dir) for member in members)]
    state = "" if Path(data_dir).expanduser().is_dir() else " (no such folder)"
    kind = "" if split == "any" else f"{split} "
    return (
        f"No {kind}data of '{name}' in '{data_dir}'{state} (eval.data_dir): expected {task}/{file} there or in its "
        f"{group}/ folder." + (f" Splits there: {', '.join(there)} (eval.split=…)." if there else "")
    )


def read_records(path: Path, task: str) -> list[dict[str, str]]:
    """The records of a file as `{"task", "instruction", "input", "answer"}`, all text; UserError naming the bad one."""
    try:
        records = read_json(path, numbers=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {why(error)}.") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a JSON array of records with instruction, input, output and answer.")
    return check_records(records, str(path), task)


def check_records(records: list[Any], source: str, task: str) -> list[dict[str, str]]:
    """The records of `source` as `read_records` gives them; UserError naming the bad one."""
    return [_record(record, f"{source}, record {number}", task) for number, record in enumerate(records, 1)]


def _record(record: Any, where: str, task: str) -> dict[str, str]:
    fields = record if isinstance(record, dict) else {}
    if not isinstance(fields.get("instruction"), str) or fields.get("answer") is None:
        raise UserError(f"{where}: expected an object with 'instruction' (text) and 'answer'.")
    label = str(fields["answer"]).strip()
    pattern = PATTERNS.get(task)
    if pattern is not None and not pattern.fullmatch(label):
        # No answer could ever match such a label, so the task would score too low without a word.
        raise UserError(f"{where}: the answer '{shown(label)}' of a {task} record should match '{pattern.pattern}'.")
    if pattern is None:
        try:
            label = repr(float(label.replace(",", "")))
        except ValueError as error:
            raise UserError(f"{where}: the answer '{shown(label)}' of a {task} record should be a number.") from error
        if not math.isfinite(float(label)):
            raise UserError(f"{where}: the answer '{shown(label)}' of a {task} record should be finite.")
    return {
        "task": task,
        "instruction": fields["instruction"],
        "input": str(fields.get("input") or ""),
        "answer": label,
    }


def load_records(
    task: str, path: str | None = None, data_dir: str | None = None, split: str = "test", **metadata: Any
) -> dict[str, Any]:
    """One task's data set as lm-eval asks for it: of the file `path`, else of `split` in `data_dir`, else of the hub.

    Under plain lm-eval `data_dir` and `split` come from `--metadata` (what else is there plays no part here).
    """
    import datasets

    if path is None and data_dir is not None:
        path = str(select_files([task], split, data_dir)[0][task][task])
    if path is not None:
        return {"test": datasets.Dataset.from_list(read_records(Path(path), task))}
    where = select_sources([task], split)[0][task][task]
    return {"test": datasets.Dataset.from_list(check_records(load_from_hub(task), where, task))}


def prompt_text(doc: dict[str, str]) -> str:
    return alpaca_prompt(doc["instruction"], doc["input"])


def extract_responses(responses: list[list[str]], docs: Any) -> list[list[str | float | None]]:
    """lm-eval's filter: every generated text becomes the answer it gives."""
    return [[extract(doc["task"], text) for text in texts] for texts, doc in zip(responses, docs, strict=True)]


def verdict(doc: dict[str, str], results: list[str | float | None]) -> dict[str, float]:
    return {"acc": float(is_correct(results[0], doc["answer"])), "no_answer": float(results[0] is None)}


def build_task(task: str, path: Path | None, num_beams: int, max_new_tokens: int) -> ConfigurableTask:
    """The lm-eval task `task` on the records of `path` (None: of the hub), read and checked."""
    from lm_eval.api.task import ConfigurableTask

    config = common("llm_adapters")
    config["generation_kwargs"] |= {"max_gen_toks": max_new_tokens, "num_beams": num_beams}
    file = None if path is None else str(path)
    own = {"task": task, "dataset_path": file or SOURCES[task].path, "dataset_kwargs": {"task": task, "path": file}}
    return ConfigurableTask(config=config | own)
