"""Answers to the MT-Bench questions (Zheng et al. 2023), in FastChat's format, for any judge.

The data is FastChat's `question.jsonl`: one question a line with `question_id`, `category` and its `turns`. Each turn
is answered for all questions together, in batches sorted by length; a later turn sees the earlier ones with their
answers. What is written is `model_answer/<model_id>.jsonl`, which `fastchat.llm_judge.gen_judgment` reads. No judge
runs here, so the task has no accuracy.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft.data.prompts import AS_MESSAGES, STOPS, alpaca_conversation, guanaco_conversation, plain_conversation
from sparseft.data.templates import asking, end_of_turn
from sparseft.errors import UserError
from sparseft.files.atomic import dumps, write_text
from sparseft.files.untrusted import parse_json, why
from sparseft.runs.folder import ANSWERS

MT_BENCH = "mt_bench"  # two-turn questions whose answers a judge reads elsewhere: no accuracy

FILE = "question.jsonl"
MAX_NEW_TOKENS = 1024  # a turn, as FastChat's
# FastChat's sampling temperatures; what is in no category of theirs gets 0.7, as there.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
GREEDY_BELOW = 1e-4

Turns = list[str]
Prompt = Callable[[Turns, Turns], str]  # (questions so far, answers so far, one fewer) -> the text to go on from


def read_questions(data_dir: str | None) -> list[dict[str, Any]]:
    """FastChat's questions from `<data_dir>/question.jsonl` or `<data_dir>/mt_bench/question.jsonl`.

    Raises UserError for a missing file, and naming file and line of a bad question.
    """
    where = f"eval.data_dir=FOLDER with FOLDER/{FILE} (of github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench)"
    if data_dir is None:
        raise UserError(f"{MT_BENCH} needs its questions: set {where}.")
    root = Path(data_dir).expanduser()
    path = next((folder / FILE for folder in (root, root / MT_BENCH) if (folder / FILE).is_file()), None)
    if path is None:
        raise UserError(f"No {MT_BENCH} questions in '{data_dir}': set {where}.")
    questions: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON allows in a text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {why(error)}.") from error
        turns = question.get("turns") if isinstance(question, dict) else None
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
            or question.get("question_id") is None
        ):
            raise UserError(f"{path}, line {number}: expected an object with 'question_id' and 'turns' (texts).")
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no question.")
    return questions


def temperature(question: dict[str, Any]) -> float:
    """The sampling temperature of a question's category."""
    return TEMPERATURES.get(str(question.get("category")), OTHER_TEMPERATURE)


def prompt_of(format: str, tokenizer: Any) -> tuple[str, Prompt]:
    """`(alpaca | guanaco | chat | plain, the function that writes such prompts)`; `auto` is chat where the tokenizer
    has a template, else alpaca, and AS_MESSAGES (`target.prompt_format`) chat or plain. UserError for chat without a
    template."""
    template = getattr(tokenizer, "chat_template", None)
    if format in ("auto", AS_MESSAGES):
        format = "chat" if template else "alpaca" if format == "auto" else "plain"
    if format == "chat":
        if not template:
            raise UserError("eval.prompt=chat: the tokenizer has no chat template; use eval.prompt=alpaca or guanaco.")
        return format, lambda asked, answered: _chat(asked, answered, tokenizer)
    forms: dict[str, Callable[..., str]] = {
        "alpaca": alpaca_conversation,
        "guanaco": guanaco_conversation,
        "plain": plain_conversation,
    }
    write = forms[format]

    def written(asked: Turns, answered: Turns) -> str:
        # An answer as it was generated may lack the space that training has before it, or end in line breaks.
        return write(zip(asked, (text.strip() for text in answered), strict=False), asked[-1])

    return format, written


def _chat(asked: Turns, answered: Turns, tokenizer: Any) -> str:
    messages = []
    for position, question in enumerate(asked):
        messages.append({"role": "user", "content": question})
        if position < len(answered):
            messages.append({"role": "assistant", "content": answered[position].strip()})
    text = asking(tokenizer, messages)
    # A template writes BOS as text; the tokenizer, which will see that text, may put its own before it. Where it then
    # goes on otherwise (with a `▁` that it puts at a text's beginning only), lm-eval sees BOS and adds none.
    bare = text.removeprefix(tokenizer.bos_token or "")
    return bare if tokenizer(bare).input_ids == tokenizer(text, add_special_tokens=False).input_ids else text


def answer(lm: Any, questions: list[dict[str, Any]], format: str, max_new_tokens: int) -> list[dict[str, Any]]:
    """One record a question: `prompts` and `turns` (the answers, stripped), and what every sample has.

    `lm` is the harness's LanguageModel; `format` as `prompt_of` takes it; `max_new_tokens` bounds each turn.
    """
    from lm_eval.api.instance import Instance

    format, prompt = prompt_of(format, lm.tokenizer)
    ends = sorted(end_of_turn(lm.tokenizer)) if format == "chat" else []
    said: list[Turns] = [[] for _ in questions]
    prompts: list[Turns] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        open_ones = [index for index, question in enumerate(questions) if turn < len(question["turns"])]
        requests = []
        for index in open_ones:
            warmth = temperature(questions[index])
            sampling: dict[str, Any] = {"do_sample": False}
            if warmth >= GREEDY_BELOW:
                sampling = {"do_sample": True, "temperature": warmth, "top_p": 1.0, "top_k": 0}
            prompts[index].append(prompt(questions[index]["turns"][: turn + 1], said[index]))
            settings = {"until": STOPS[format], "max_gen_toks": max_new_tokens, "ends": ends, **sampling}
            requests.append(Instance("generate_until", questions[index], (prompts[index][-1], settings), index))
        for index, text in zip(open_ones, lm.generate_until(requests), strict=True):
            said[index].append(text)
    return [
        {
            "task": MT_BENCH,
            "doc_id": number,
            "question_id": question["question_id"],
            "category": question.get("category"),
            "prompt": prompts[number][0],
            "prompts": prompts[number],
            "response": said[number][0],
            "turns": [text.strip() for text in said[number]],
            "answer": None,
            "target": None,
            "correct": None,
            "truncated": any(text in lm.truncated for text in prompts[number]),
            "metrics": {},
        }
        for number, question in enumerate(questions)
    ]


def add_to(outcome: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Adds the task to what `results.assemble` made of the others; its entry has no accuracy, which a judge gives."""
    cut = sum(record["truncated"] for record in records)
    entry = {
        "accuracy": None,
        "stderr": None,
        "samples": len(records),
        "shots": 0,
        "truncated": cut,
        "metric": None,
        "metrics": {},
    }
    outcome["tasks"][MT_BENCH] = entry
    outcome["members"][MT_BENCH] = [MT_BENCH]
    outcome["samples"][MT_BENCH] = records
    if cut:
        outcome["warnings"].append(
            f"{MT_BENCH}: {cut} of {len(records)} conversations were longer than the context of "
            f"{outcome['max_length']} tokens and lost their beginning."
        )


def write_answers(folder: Path, records: list[dict[str, Any]], model_id: str) -> Path:
    """Writes `eval/mt_bench/model_answer/<model_id>.jsonl` below `folder`, by question id, and returns its path."""
    lines = [
        dumps(
            {
                "question_id": record["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": record["turns"]}],
                "tstamp": time.time(),
            }
        )
        for record in sorted(records, key=lambda record: str(record["question_id"]).zfill(12))
    ]
    path = Path(folder) / ANSWERS / f"{model_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return path
