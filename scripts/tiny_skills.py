"""What the tiny base model can do: exact-match accuracy of each skill on questions that its text does not contain."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from tiny_text import Document, quiz_forms, turn  # noqa: E402
from tiny_world import ARITHMETIC_SUBJECT, KINDS, NUMBERS, OBJECTS, PEOPLE, TOP, World  # noqa: E402

from sparseft.data.prompts import mmlu_header, mmlu_question  # noqa: E402

Question = tuple[str, str, list[str]]  # prompt, right continuation, all continuations the chance counts


def mmlu_questions(world: World, rng: Random, shots: int = 5, count: int = 64) -> dict[str, list[Question]]:
    """Per subject, `count` questions after `shots` solved ones."""
    letters = [f" {letter}" for letter in "ABCD"]
    result = {}
    for kind in (*KINDS, None):
        subject = kind.subject if kind else ARITHMETIC_SUBJECT
        pool = list(world.sums) if kind is None else world.of(kind)
        forms = [form for item in pool for form in quiz_forms(item)]
        questions = []
        for question, choices, place in rng.sample(forms, count):
            prompt = mmlu_header(subject)
            for shot, options, right in rng.sample([f for f in forms if f[0] != question], shots):
                prompt += mmlu_question(shot, options) + letters[right] + "\n\n"
            questions.append((prompt + mmlu_question(question, choices), letters[place], letters))
        result[f"mmlu {subject}"] = questions
    return result


def skill_questions(world: World, seed: int = 0) -> dict[str, list[Question]]:
    """Questions of every skill of the base text; facts are held ones."""
    rng = Random(f"skills-{world.seed}-{seed}")
    skills = mmlu_questions(world, rng)
    wh, yes_no, numbered, words, stories = [], [], [], [], []
    for fact in world.lettered(held=True):
        said = turn(Document(), fact.ask()).text + " " + fact.open_statement()[0]
        wh.append((said, f" {fact.value}", [f" {v}" for v in fact.property.values]))
        choices, place = fact.choices()
        listed = " ".join(f"({n}) {choice}" for n, choice in enumerate(choices, 1))
        numbered.append((turn(Document(), f"{fact.ask()} {listed}").text + " (", f"{place + 1}", list("1234")))
    for fact in world.switches(held=True):
        yes_no.append((turn(Document(), fact.ask_if()).text, " Yes" if fact.is_first else " No", [" Yes", " No"]))
    for item in rng.sample(world.sums, 72):
        words.append((f"{item.words.capitalize()} is", f" {NUMBERS[item.result]}.", [""] * (TOP + 1)))
        who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
        story = f"{who} has {item.a} {what} and {'finds' if item.plus else 'loses'} {item.b}. Now {who} has"
        stories.append((story, f" {item.result} {what}", [""] * (TOP + 1)))
    skills |= {"facts, asked": wh, "facts, yes or no": yes_no, "facts, numbered choice": numbered}
    return skills | {"sums in words": words, "counting stories": stories}


@torch.no_grad()
def correct(model, tokenizer, question: Question) -> bool:
    """Whether greedy decoding gives every token of the right continuation (for one-token answers: whether it has the
    highest logit of the whole vocabulary)."""
    prompt, right, _ = question
    head = tokenizer.encode(prompt)
    tail = tokenizer.encode(right)
    logits = model(input_ids=torch.tensor([head + tail]), use_cache=False).logits[0]
    return logits[len(head) - 1 : -1].argmax(-1).tolist() == tail


def measure(model, tokenizer, world: World, limit: int | None = None) -> dict[str, tuple[float, float, int]]:
    """{skill: (accuracy, chance, questions)}"""
    model.eval()
    result = {}
    for name, questions in skill_questions(world).items():
        questions = questions[:limit]
        hits = sum(correct(model, tokenizer, q) for q in questions)
        chance = sum(1 / len(q[2]) for q in questions) / len(questions)
        result[name] = hits / len(questions), chance, len(questions)
    return result


def line(skills: dict[str, tuple[float, float, int]]) -> str:
    return "  ".join(f"{name} {accuracy:.0%}" for name, (accuracy, _, _) in skills.items())
