"""MMLU as lm-eval tasks, one a subject, from a folder of csv files or from the hub.

The folder is the authors' own layout: `dev/<subject>_dev.csv`, `val/<subject>_val.csv`, `test/<subject>_test.csv`,
rows of question, A, B, C, D, answer without a header. The hub's `cais/mmlu` holds the same questions. Prompts follow
the authors' `evaluate.py` in lm-eval's spelling of it: a header line, the first k dev questions with their answers,
and the question up to `Answer:`; the continuations " A" … " D" are scored by log-likelihood.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.data.prompts import mmlu_header, mmlu_question
from sparseft.errors import UserError, nearest, reason_of
from sparseft.evaluation.task_files import common

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

MMLU = "mmlu"
# The 57 subjects by category, as lm-eval groups them; the authors' own `categories.py` has others (anatomy as "other").
MMLU_CATEGORIES = {
    "stem": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning"
    ).split(),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history "
        "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
        "professional_law world_religions"
    ).split(),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ).split(),
    "other": (
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ).split(),
}
MMLU_SUBJECTS = tuple(sorted(subject for subjects in MMLU_CATEGORIES.values() for subject in subjects))

HUB = "cais/mmlu"
DEFAULT_SHOTS = 5
LETTERS = ("A", "B", "C", "D")
FOLDERS = {"dev": "dev", "validation": "val", "test": "test"}  # split: its folder and the end of its file names


def find_folder(data_dir: str | Path) -> Path:
    """The folder that holds `dev/`, `val/` or `test/`: `data_dir` itself or its `mmlu/`; UserError if neither does."""
    root = Path(data_dir).expanduser()
    for folder in (root / MMLU, root):
        if any((folder / name).is_dir() for name in FOLDERS.values()):
            return folder
    state = "holds none of them" if root.is_dir() else "does not exist"
    raise UserError(
        f"No MMLU data in '{data_dir}' (eval.data_dir): expected dev/, val/ or test/ with <subject>_<split>.csv there "
        f"or in its mmlu/ folder, which {state}."
    )


def local_subjects(data_dir: str | Path, split: str | None = None) -> list[str]:
    """The subjects whose csv file of `split` (`test`, `validation`, `dev`; None: any of them) is in the folder,
    sorted; an empty list where there is no MMLU data at all."""
    try:
        folder = find_folder(data_dir)
    except UserError:
        return []
    ends = [FOLDERS[split]] if split else list(FOLDERS.values())
    found = {path.name.removesuffix(f"_{end}.csv") for end in ends for path in (folder / end).glob(f"*_{end}.csv")}
    return sorted(found)


def is_mmlu(name: str, data_dir: str | None) -> bool:
    """Whether a task is MMLU, one of its categories or subjects, those of the folder included."""
    if name == MMLU:
        return True
    part = name.removeprefix(f"{MMLU}_")
    if part == name:
        return False
    # lm-eval has other names that start so (mmlu_pro); a subject of the folder counts as ours.
    known = {*MMLU_CATEGORIES, *MMLU_SUBJECTS, *(local_subjects(data_dir) if data_dir else ())}
    return part in known


def resolve_split(split: str, data_dir: str | None) -> str:
    """`any` is the test split where the data has it (the hub has), else the validation split."""
    if split != "any":
        return split
    return "test" if data_dir is None or local_subjects(data_dir, "test") else "validation"


def select_subjects(requested: list[str], split: str, data_dir: str | None) -> dict[str, list[str]]:
    """The subjects behind each requested name (`mmlu`, `mmlu_<category>`, `mmlu_<subject>`).

    Raises UserError when the folder lacks the split (saying which it has) or the subject.
    """
    if data_dir is None:
        there = list(MMLU_SUBJECTS)
    else:
        folder = find_folder(data_dir)
        there = local_subjects(data_dir, split)
        if not there:
            splits = [name for name in FOLDERS if name != "dev" and local_subjects(data_dir, name)]
            raise UserError(
                f"No MMLU questions of split '{split}' in '{folder}': expected {FOLDERS[split]}/<subject>_"
                f"{FOLDERS[split]}.csv. Splits there: {', '.join(splits) or 'none'} (eval.split=…)."
            )
    selected: dict[str, list[str]] = {}
    for name in requested:
        part = name.removeprefix(MMLU).removeprefix("_")
        if not part:
            selected[name] = there
        elif part in there:
            selected[name] = [part]
        else:
            selected[name] = [subject for subject in there if subject in MMLU_CATEGORIES.get(part, ())]
            if not selected[name]:
                hint = nearest(name, [f"{MMLU}_{subject}" for subject in there])
                raise UserError(f"No questions for '{name}' of split '{split}' in '{data_dir}'.{hint}")
    return selected


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The rows of one csv file as `{"question": str, "choices": [str] * 4, "answer": int in 0..3}`.

    The csv module, not pandas: a choice such as `NA` or `1.0` is text, and quoted fields may hold newlines.
    Raises UserError naming file and line of a bad row.
    """
    questions = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            for row in rows:
                if not row:
                    continue
                if len(row) != 6 or row[5].strip() not in LETTERS:
                    raise UserError(
                        f"{path}, line {rows.line_num}: expected question, A, B, C, D and the answer's letter, "
                        f"got {len(row)} fields ending in '{row[-1][:40]}'."
                    )
                questions.append(
                    {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5].strip())},
                )
    except FileNotFoundError as error:
        raise UserError(f"No file '{path}'.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a csv file in UTF-8: {error}.") from error
    if not questions:
        raise UserError(f"{path} holds no question.")
    return questions


def load_subject(
    subject: str,
    split: str = "test",
    shots: int = DEFAULT_SHOTS,
    folder: str | None = None,
    data_dir: str | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """The data sets of one subject, `{"test": …}` for the split asked for and `{"dev": …}` where shots are used.

    lm-eval calls this with the task's `dataset_kwargs` and its metadata. Under plain lm-eval `data_dir` and `split`
    come from `--metadata` (what else is there plays no part here).
    """
    import datasets

    if folder is None and data_dir is not None:
        folder = str(find_folder(data_dir))
    if folder is None:
        data = _from_hub(subject)
        loaded = {"test": data[split], **({"dev": data["dev"]} if shots else {})}
        if shots > len(data["dev"]):
            raise UserError(f"eval.shots={shots}, but {HUB} has {len(data['dev'])} dev examples of {subject}.")
        return loaded

    def read(name: str) -> list[dict[str, Any]]:
        return read_questions(Path(folder) / FOLDERS[name] / f"{subject}_{FOLDERS[name]}.csv")

    loaded = {"test": datasets.Dataset.from_list(read(split))}
    if shots:
        path = Path(folder) / "dev" / f"{subject}_dev.csv"
        if not path.is_file():
            raise UserError(f"{shots} shots of '{subject}' need '{path}', which is not there; eval.shots=0 needs none.")
        examples = read("dev")
        if shots > len(examples):
            raise UserError(f"eval.shots={shots}, but {path} has {len(examples)} examples.")
        loaded["dev"] = datasets.Dataset.from_list(examples)
    return loaded


def _from_hub(subject: str) -> Any:
    """`cais/mmlu` of one subject from the hub or its cache."""
    import datasets

    try:
        return datasets.load_dataset(HUB, subject)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Offline, no such cache, or the hub cannot be reached: all three are for the user to settle.
        raise UserError(
            f"MMLU ({HUB}, {subject}) is neither in the Hugging Face cache nor could it be fetched "
            f"({reason_of(error)}); set eval.data_dir=FOLDER to a folder with dev/, val/ and test/ csv files."
        ) from error


def question_text(doc: dict[str, Any]) -> str:
    return mmlu_question(doc["question"], doc["choices"])


def build_task(subject: str, split: str, shots: int, data_dir: str | None) -> ConfigurableTask:
    """The lm-eval task `mmlu_<subject>`, its data read and checked."""
    from lm_eval.api.task import ConfigurableTask

    folder = None if data_dir is None else str(find_folder(data_dir))
    own = {
        "task": f"{MMLU}_{subject}",
        "task_alias": subject,
        "dataset_path": folder or HUB,
        "dataset_kwargs": {"subject": subject, "split": split, "shots": shots, "folder": folder},
        "fewshot_split": "dev" if shots else None,
        "num_fewshot": shots,
        "description": mmlu_header(subject),
    }
    return ConfigurableTask(config=common(MMLU) | own)
