"""The bundled data sets: small, generated, in the exact formats of the public sets they stand for.

Training records ask for open facts and sums only, tests and evaluation texts for held ones (see `tiny_world.py`), so
no question of a test occurs in a training file.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from tiny_text import quiz_forms
from tiny_world import ARITHMETIC_SUBJECT, KINDS, OBJECTS, PEOPLE, Fact, Sum, World

from sparseft.data.prompts import (
    ASSISTANT,
    CHOOSE_ANSWER,
    CHOOSE_SOLUTION,
    alpaca_prompt,
    choose,
    human_turn,
    true_or_false,
)

Record = dict[str, str]  # instruction, input, output, answer
ARITHMETIC_TRAIN = {"gsm8k": 250, "AddSub": 200, "AQuA": 150}
ARITHMETIC_TEST = {"gsm8k": 100, "AddSub": 100, "AQuA": 100}
MMLU_DEV, MMLU_VALIDATION, MMLU_TEST = 5, 20, 60  # questions a subject
DIALOGUES = {"train": 300, "eval": 60}
PARAGRAPHS = {"train": 300, "eval": 40}
PAIRS = {"train": 64, "eval": 24}


# Commonsense: the instructions of LLM-Adapters' sets, word for word.


def commonsense_record(instruction: str, answer: str) -> Record:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def boolq(fact: Fact) -> Record:
    question = fact.ask_if()
    question = question[0].lower() + question[1:]
    return commonsense_record(true_or_false(question.removesuffix("?")), "true" if fact.is_first else "false")


def piqa(fact: Fact) -> Record:
    choices, place = fact.choices()
    head = f"{CHOOSE_SOLUTION}Tell the truth about the {fact.thing}."
    prompt = choose(head, "solution", [fact.say(choice) for choice in choices], "\n\n")
    return commonsense_record(prompt, f"solution{place + 1}")


def four_answers(question: str, choices: list[str], place: int) -> Record:
    return commonsense_record(choose(CHOOSE_ANSWER + question, "answer", choices), f"answer{place + 1}")


def arc_easy(fact: Fact) -> Record:
    choices, place = fact.choices()
    return four_answers(fact.ask(), [f"{choice}." for choice in choices], place)


def openbookqa(fact: Fact) -> Record:
    """A sentence to complete. What follows the value ("petals") goes with each choice."""
    choices, place = fact.choices()
    start, end = fact.open_statement()
    return four_answers(start, [choice + end.removesuffix(".") for choice in choices], place)


COMMONSENSE: dict[str, Callable[[Fact], Record]] = {
    "boolq": boolq,
    "piqa": piqa,
    "ARC-Easy": arc_easy,
    "openbookqa": openbookqa,
}


def distinct(make: Callable[[], Record], count: int, label: str) -> list[Record]:
    """`count` records of different instructions."""
    records: dict[str, Record] = {}
    for _ in range(50 * count):
        record = make()
        records.setdefault(record["instruction"], record)
        if len(records) == count:
            return list(records.values())
    raise ValueError(f"{label}: only {len(records)} different questions exist, {count} were asked for")


def commonsense_records(world: World, task: str, held: bool) -> list[Record]:
    """One record of every fact that the task can ask for; of the held ones as many with each answer as there are with
    the rarest, so that a constant guess scores chance in the tests."""
    pool = world.switches(held) if task in ("boolq", "piqa") else world.lettered(held)
    rng = Random(f"commonsense-{world.seed}-{task}-{held}")
    shuffled = rng.sample(pool, len(pool))
    if held:
        places = [fact.choices()[1] for fact in shuffled]
        fewest = min(places.count(place) for place in set(places))
        shuffled = [f for n, f in enumerate(shuffled) if places[:n].count(places[n]) < fewest]
    return [COMMONSENSE[task](fact) for fact in shuffled]


# Arithmetic: as in LLM-Adapters' math_10k, a short rationale and then "The answer is N.".

STORIES = {  # (plus, first step): sentence
    (True, True): "{who} has {a} {what} and finds {b} more.",
    (False, True): "{who} has {a} {what} and loses {b}.",
    (True, False): "Then {who} buys {b} {what}.",
    (False, False): "Then {who} sells {b} {what}.",
}


def one_step(rng: Random, item: Sum) -> tuple[str, str]:
    """A story with its question, and its rationale."""
    who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
    story = STORIES[item.plus, True].format(who=who, what=what, a=item.a, b=item.b)
    return f"{story} How many {what} does {who} have now?", f"{item.digits} = {item.result}."


def number_record(question: str, rationale: str, result: int) -> Record:
    output = f"{rationale} The answer is {result}."
    return {"instruction": question, "input": "", "output": output, "answer": f"{result}.0"}


def add_sub(rng: Random, pool: list[Sum]) -> Record:
    item = rng.choice(pool)
    return number_record(*one_step(rng, item), item.result)


def gsm8k(rng: Random, pool: list[Sum]) -> Record:
    first = rng.choice([s for s in pool if any(t.a == s.result for t in pool)])
    second = rng.choice([t for t in pool if t.a == first.result])
    who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
    start = STORIES[first.plus, True].format(who=who, what=what, a=first.a, b=first.b)
    end = STORIES[second.plus, False].format(who=who, what=what, b=second.b)
    rationale = f"{first.digits} = {first.result}. {second.digits} = {second.result}."
    return number_record(f"{start} {end} How many {what} does {who} have now?", rationale, second.result)


def aqua(rng: Random, pool: list[Sum]) -> Record:
    item = rng.choice(pool)
    question, rationale = one_step(rng, item)
    choices, place = item.choices(5)
    listed = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDE", choices, strict=True))
    answer = "ABCDE"[place]
    return {
        "instruction": f"{question} Answer Choices: {listed}",
        "input": "",
        "output": f"{rationale} The answer is ({answer}).",
        "answer": answer,
    }


ARITHMETIC: dict[str, Callable[[Random, list[Sum]], Record]] = {"gsm8k": gsm8k, "AddSub": add_sub, "AQuA": aqua}


def arithmetic_records(world: World, task: str, held: bool, count: int) -> list[Record]:
    rng = Random(f"arithmetic-{world.seed}-{task}-{held}")
    pool = [s for s in world.sums if s.held == held]
    return distinct(lambda: ARITHMETIC[task](rng, pool), count, task)


def mixed(rng: Random, families: Iterable[list[Record]]) -> list[Record]:
    records = [record for family in families for record in family]
    rng.shuffle(records)
    return records


def commonsense_train(world: World) -> list[Record]:
    families = (commonsense_records(world, task, held=False) for task in COMMONSENSE)
    return mixed(Random(f"commonsense-{world.seed}"), families)


def arithmetic_train(world: World) -> list[Record]:
    families = (arithmetic_records(world, task, False, n) for task, n in ARITHMETIC_TRAIN.items())
    return mixed(Random(f"arithmetic-{world.seed}"), families)


def prompt_texts(world: World) -> list[str]:
    """What the tokenizer should keep short besides the base text: the training records in their prompts."""
    records = [*commonsense_train(world), *arithmetic_train(world)]
    records += [{**record, "input": record["answer"]} for record in records[:200]]
    return [alpaca_prompt(r["instruction"], r["input"]) + r["output"] for r in records]


# MMLU: csv without header, question, four choices, letter.


def mmlu_rows(world: World, kind_index: int | None) -> dict[str, list[list[str]]]:
    """{dev, val, test: rows} of one subject; no question is in two of them."""
    subject = ARITHMETIC_SUBJECT if kind_index is None else KINDS[kind_index].subject
    rng = Random(f"mmlu-{world.seed}-{subject}")
    pool = list(world.sums) if kind_index is None else world.of(KINDS[kind_index])
    forms = [form for item in pool for form in quiz_forms(item)]
    rows = [[q, *choices, "ABCD"[place]] for q, choices, place in rng.sample(forms, len(forms))]
    first, second = MMLU_DEV, MMLU_DEV + MMLU_VALIDATION
    return {"dev": rows[:first], "val": rows[first:second], "test": rows[second : second + MMLU_TEST]}


# Dialogues in guanaco's form and plain paragraphs: in a manner that the base text does not have.

GREETINGS = ("Good day! I have a question.", "Hello there!", "Can you help me, please?", "I like the old books.")
REPLIES = ("Of course! What would you like to know?", "Hello! Please ask me.", "With pleasure. Go on!")
ASKING = ("Please tell me: {q}", "{q} I forgot it.", "One more thing: {q}", "My friend {p} asks: {q}")
TELLING = (
    "Good question! {s} Do ask me more.",
    "I am happy to help. {s}",
    "Let me think. I believe it is this: {s}",
    "Thank you for asking, {p}. {s} Is there anything else?",
)


def dialogue(rng: Random, pool: list[Fact]) -> str:
    who = rng.choice(PEOPLE)
    turns = [(rng.choice(GREETINGS), rng.choice(REPLIES))] if rng.random() < 0.4 else []
    for fact in rng.sample(pool, rng.choice((1, 2, 3))):
        question = fact.ask()
        turns.append((rng.choice(ASKING).format(q=question, p=who), rng.choice(TELLING).format(s=fact.say(), p=who)))
    return "".join(f"{human_turn(said)}{ASSISTANT} {reply}" for said, reply in turns)


def pair(rng: Random, pool: list[Fact]) -> str:
    """A question with two true answers, as a line of JSON: the kind one is the better."""
    fact, who = rng.choice(pool), rng.choice(PEOPLE)
    prompt = f"{rng.choice(ASKING).format(q=fact.ask(), p=who)}\n"
    kind = rng.choice(TELLING).format(s=fact.say(), p=who)
    return json.dumps({"prompt": prompt, "chosen": kind, "rejected": fact.say()}, ensure_ascii=False)


OPENINGS = ("One morning {p} walks to the {place}.", "{p} and {q} sit by the {place}.", "It is late, and {p} is tired.")
MIDDLES = (
    "{p} looks for the {e} for a long time.",
    "{q} has heard of the {e} before.",
    "An old map of {q} shows the {e}.",
)
ENDINGS = ("Then they go home and tell {q}.", "{p} writes it down at once.", "Nobody in town believes them.")


def paragraph(rng: Random, pool: list[Fact]) -> str:
    p, q = rng.sample(PEOPLE, 2)
    fact = rng.choice(pool)
    facts = [f for f in pool if f.thing == fact.thing]
    words = {"p": p, "q": q, "e": fact.thing, "place": rng.choice(KINDS[0].properties[1].values)}
    known = [f"{q} says: {f.say()}" if rng.random() < 0.5 else f.say() for f in rng.sample(facts, min(2, len(facts)))]
    sentences = [rng.choice(OPENINGS), rng.choice(MIDDLES)]
    return " ".join([*(s.format(**words) for s in sentences), *known, rng.choice(ENDINGS).format(**words)])


def texts(world: World, make: Callable[[Random, list[Fact]], str], split: str, count: int) -> list[str]:
    """`count` different texts; those of "train" tell open facts, those of "eval" held ones."""
    rng = Random(f"{make.__name__}-{world.seed}-{split}")
    pool = [f for f in world.facts if f.held == (split == "eval")]
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(make(rng, pool))
    return list(found)


def files(world: World) -> dict[str, str]:
    """Every file of the data folder: {path: content}."""

    def array(records: list[Record]) -> str:
        return json.dumps(records, indent=1, ensure_ascii=False) + "\n"

    result = {"commonsense/train.json": array(commonsense_train(world))}
    for task in COMMONSENSE:
        result[f"commonsense/{task}/test.json"] = array(commonsense_records(world, task, held=True))
    result["arithmetic/train.json"] = array(arithmetic_train(world))
    for task, count in ARITHMETIC_TEST.items():
        result[f"arithmetic/{task}/test.json"] = array(arithmetic_records(world, task, True, count))
    for index in (*range(len(KINDS)), None):
        subject = ARITHMETIC_SUBJECT if index is None else KINDS[index].subject
        for split, rows in mmlu_rows(world, index).items():
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerows(rows)
            result[f"mmlu/{split}/{subject}_{split}.csv"] = buffer.getvalue()
    for split, count in DIALOGUES.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts(world, dialogue, split, count))
        result[f"oasst1/{split}.jsonl"] = "".join(f"{line}\n" for line in lines)
    for split, count in PAIRS.items():
        result[f"preference/{split}.jsonl"] = "".join(f"{line}\n" for line in texts(world, pair, split, count))
    for split, count in PARAGRAPHS.items():
        result[f"text/{split}.txt"] = "\n\n".join(texts(world, paragraph, split, count)) + "\n"
    return result


def write(world: World, folder: Path) -> None:
    """Writes all files aside and renames the folder, so that no half of it is ever seen."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".data-"))
    aside.chmod(0o755)
    for name, content in files(world).items():
        path = aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
