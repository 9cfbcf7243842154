"""The commonsense and arithmetic sets of LLM-Adapters (Hu et al. 2023) as lm-eval tasks, as S2FT evaluates them.

Zero-shot: the Alpaca prompt of training, a generated answer (greedy or beams), and a verdict on its text. Commonsense:
the first match of the task's pattern equals the label. Arithmetic: the last number lies within 1e-3 of the label; in
AQuA the first capital A to E is the label. Data: `<task>/test.json`, an array of records with `instruction`, `input`,
`output`, `answer`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.data.prompts import alpaca_prompt
from sparseft.errors import UserError, shown
from sparseft.evaluation import llm_adapters_hub as hub
from sparseft.evaluation.task_files import common
from sparseft.files.untrusted import read_json, why

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

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
        selected[name] = {task: hub.SOURCES[task].path for task in members if task in hub.SOURCES}
        absent = [task for task in members if task not in hub.SOURCES]
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
    return {"test": datasets.Dataset.from_list(check_records(hub.load(task), where, task))}


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
    own = {"task": task, "dataset_path": file or hub.SOURCES[task].path, "dataset_kwargs": {"task": task, "path": file}}
    return ConfigurableTask(config=config | own)
