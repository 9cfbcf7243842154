"""The text that the tiny base model is trained on: an endless, seeded stream of short documents about the world.

Each writer makes one kind of document. None of them shows the Alpaca prompt or an answer in the format of the
commonsense sets: that skill stays new.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from tiny_world import ARITHMETIC_SUBJECT, KINDS, NUMBERS, OBJECTS, PEOPLE, Fact, Sum, World

from sparseft.data.prompts import ASSISTANT, HUMAN, mmlu_header, mmlu_question


@dataclass
class Document:
    """Text with the character spans that can be known from what comes before (the loss weighs them more)."""

    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)

    def add(self, text: str) -> Document:
        self.text += text
        return self

    def answer(self, text: str) -> Document:
        self.answers.append((len(self.text), len(self.text) + len(text)))
        return self.add(text)

    def tell(self, sentence: str, value: str) -> Document:
        """Adds `sentence`, marking the last occurrence of " value" as known."""
        start = sentence.rindex(f" {value}")
        return self.add(sentence[:start]).answer(f" {value}").add(sentence[start + 1 + len(value) :])


def quiz_forms(item: Fact | Sum) -> list[tuple[str, list[str], int]]:
    """The MMLU-form questions of a fact or a sum: text, four choices, the place of the right one."""
    choices, place = item.choices()
    if isinstance(item, Fact):
        start, end = item.open_statement()
        return [(item.ask(), choices, place), (start, [choice + end for choice in choices], place)]
    numbers = [NUMBERS[n] for n in choices]
    return [(f"What is {item.words}?", numbers, place), (f"{item.words.capitalize()} is", numbers, place)]


def quiz(world: World, rng: Random) -> Document:
    """A header and one to six solved questions of one subject."""
    kind = rng.choice((*KINDS, None))
    pool = world.sums if kind is None else world.of(kind)
    document = Document()
    if rng.random() < 0.8:
        document.add(mmlu_header(kind.subject if kind else ARITHMETIC_SUBJECT))
    count = rng.choice((1, 2, 4, 6, 6, 6))
    for number, item in enumerate(rng.sample(pool, count)):
        question, choices, place = rng.choice(quiz_forms(item))
        document.add(("\n\n" if number else "") + mmlu_question(question, choices)).answer(f" {'ABCD'[place]}")
    return document


def cards(world: World, rng: Random) -> Document:
    """Questions answered in one word, as on learning cards."""
    document = Document()
    for number in range(rng.choice((4, 6, 8))):
        item = rng.choice(world.facts) if rng.random() < 0.75 else rng.choice(world.sums)
        question = item.ask() if isinstance(item, Fact) else f"What is {item.words}?"
        value = item.value if isinstance(item, Fact) else NUMBERS[item.result]
        document.add(("\n" if number else "") + question).answer(f" {value}")
    return document


def report(world: World, rng: Random) -> Document:
    """Plain sentences: everything about one thing, or single facts about several."""
    document = Document()
    if rng.random() < 0.5:
        kind = rng.choice(KINDS)
        thing = rng.choice(kind.things)
        facts = [f for f in world.facts if f.kind == kind and f.thing == thing]
        rng.shuffle(facts)
    else:
        facts = rng.sample(world.facts, 6)
    for number, fact in enumerate(facts):
        document.add(" " if number else "").tell(fact.say(), fact.value)
    return document


def turn(document: Document, said: str) -> Document:
    return document.add(f"{HUMAN} {said}{ASSISTANT}")


def talk(world: World, rng: Random) -> Document:
    """A dialogue in guanaco's form: one to four questions about facts and sums."""
    document = Document()
    for _ in range(rng.choice((1, 2, 3, 4))):
        form = rng.random()
        if form < 0.3:
            fact = rng.choice(world.facts)
            turn(document, fact.ask()).add(" ").tell(fact.say(), fact.value)
        elif form < 0.6:
            fact = rng.choice(world.switches())
            turn(document, fact.ask_if()).answer(" Yes" if fact.is_first else " No").add(", the ")
            document.tell(fact.say().removeprefix("The "), fact.value)
        elif form < 0.85:
            fact = rng.choice(world.lettered())
            choices, place = fact.choices()
            listed = " ".join(f"({n}) {choice}" for n, choice in enumerate(choices, 1))
            turn(document, f"{fact.ask()} {listed}").add(" (").answer(f"{place + 1}").add(")").answer(f" {fact.value}")
            document.add(".")
        else:
            item = rng.choice(world.sums)
            if rng.random() < 0.5:
                turn(document, f"What is {item.words}?").answer(f" {NUMBERS[item.result]}").add(".")
            else:
                turn(document, f"What is {item.digits}?").answer(f" {item.result}").add(".")
    return document


def counting(world: World, rng: Random) -> Document:
    """Arithmetic in words and digits, and counting stories of one step."""
    document = Document()
    for number in range(rng.choice((2, 3, 4, 5))):
        item = rng.choice(world.sums)
        document.add(" " if number else "")
        form = rng.random()
        if form < 0.45:
            document.add(f"{item.words.capitalize()} is").answer(f" {NUMBERS[item.result]}").add(".")
        elif form < 0.7:
            document.add(f"{item.digits} =").answer(f" {item.result}").add(".")
        else:
            who, what = rng.choice(PEOPLE), rng.choice(OBJECTS)
            document.add(f"{who} has {item.a} {what} and {'finds' if item.plus else 'loses'} {item.b}. Now {who} has")
            document.answer(f" {item.result}").add(f" {what}.")
    return document


# Words of the prompts that the base never sees as prompts, in other company: their embeddings are trained, and the
# prompts themselves stay new.
LETTERS = (
    "{p} reads the task and asks for the following instruction.",
    "Please choose the format you like, says {p}.",
    "A response to the request is below the line, and {p} completes it.",
    "{p} describes a correct solution, or a false one.",
    "Is it true or false? {p} knows which option is true.",
    "The answer to your question is appropriately short, says {p}.",
    "{p} likes to write an answer with input from {q}.",
    "The question is paired with a further question, and {p} likes the context.",
    "The first ending is sad, the second ending is correct, says {p}.",
    "Instruction and response, request and answer, {p} writes them all.",
    "{p} fills the blank in the given sentence to complete it.",
    "Answer me, {p}! Choose an option, or a solution, says {q}.",
    "That provides the context, says {p} to {q}, and the answer is false.",
    "Solution and option, input and format: {p} describes the choices to {q}.",
    "{p} has a rationale for every answer, and {q} likes a short step.",
    "How many {o} are left in total? {p} counts the {o} of {q} altogether.",
    "{p} gives {q} some more {o} and then buys cups.",
)


def letter(world: World, rng: Random) -> Document:
    people = rng.sample(PEOPLE, 2)
    lines = rng.sample(LETTERS, 4)
    return Document(" ".join(line.format(p=people[0], q=people[1], o=rng.choice(OBJECTS)) for line in lines))


MIXTURE = ((quiz, 0.32), (cards, 0.12), (talk, 0.26), (report, 0.12), (counting, 0.14), (letter, 0.04))  # shares


def documents(world: World, seed: int) -> Iterator[Document]:
    """An endless stream of base text."""
    rng = Random(f"documents-{world.seed}-{seed}")
    writers, shares = zip(*MIXTURE, strict=True)
    while True:
        yield rng.choices(writers, shares)[0](world, rng)
