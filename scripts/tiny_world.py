"""The invented world behind the bundled tiny model: its things, its facts and its sums.

Everything is drawn from `random.Random` with seeds made of strings, so the same seed gives the same world and the same
text on every platform. `tiny_text.py` tells the world to the model, `tiny_data.py` writes the bundled data sets of it,
`train_tiny_base.py` trains the model.

A *fact* is a (thing, property) pair and its value; the base text tells and asks all of them. A third of the facts, and
of the sums, is *held*: no bundled training record asks for them. The commonsense and arithmetic tests ask only for held
ones, so a right answer after fine-tuning needs the fact *and* the new skill, not the memory of a question.

The choices of a question always stand in the order of the property's values: which letter is right follows from the
fact. (A model of a million parameters learns facts in minutes, but not to bind a letter to a choice in any place.)
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

HELD_SHARE = 1 / 3
PLACES = ("cave", "forest", "river", "desert", "swamp", "hill", "lake", "meadow")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")


@dataclass(frozen=True)
class Property:
    """One relation of one kind of thing. Templates: `{e}` the thing, `{v}` the value."""

    name: str
    values: tuple[str, ...]
    statement: str  # "The {e} eats {v}."
    question: str  # "What does the {e} eat?"
    yes_no: str = ""  # "Is the {e} big?": of a property of two values, whether it has the first

    @property
    def is_switch(self) -> bool:
        """Whether it has two values only: asked by yes and no, and not by letters."""
        return len(self.values) == 2


@dataclass(frozen=True)
class Kind:
    """A kind of thing: its MMLU subject, its things and their properties."""

    name: str
    subject: str
    things: tuple[str, ...]
    properties: tuple[Property, ...]


@dataclass(frozen=True)
class Fact:
    kind: Kind
    thing: str
    property: Property
    value: str
    held: bool

    def say(self, value: str | None = None) -> str:
        return self.property.statement.format(e=self.thing, v=value or self.value)

    def ask(self) -> str:
        return self.property.question.format(e=self.thing)

    def ask_if(self) -> str:
        return self.property.yes_no.format(e=self.thing)

    @property
    def is_first(self) -> bool:
        """Whether the value is the property's first: the answer to `ask_if`."""
        return self.value == self.property.values[0]

    def choices(self) -> tuple[list[str], int]:
        """The choices that a question of this fact lists, always in the same order, and the place of the right one:
        four neighbours of the property's values (both of a switch)."""
        place = self.property.values.index(self.value)
        size = min(4, len(self.property.values))
        start = place // size * size
        return list(self.property.values[start : start + size]), place - start

    def open_statement(self) -> tuple[str, str]:
        """The statement around its value: ("The zorb eats", ".")."""
        start, end = self.property.statement.format(e=self.thing, v="\0").split(" \0")
        return start, end


KINDS = (
    Kind(
        "creature",
        "invented_creatures",
        tuple("zorb mipo fenk drel wuzz quop blim snerk vank hodu jeph krel lutto nimb orri plok".split()),
        (
            Property("colour", COLOURS, "The {e} is {v}.", "What colour is the {e}?"),
            Property(
                "home",
                PLACES,
                "The {e} lives in the {v}.",
                "Where does the {e} live?",
            ),
            Property(
                "food",
                ("berries", "fish", "nuts", "leaves", "honey", "roots", "seeds", "eggs"),
                "The {e} eats {v}.",
                "What does the {e} eat?",
            ),
            Property(
                "fear",
                ("thunder", "fire", "snow", "smoke", "rain", "noise", "dogs", "bells"),
                "The {e} fears {v}.",
                "What does the {e} fear?",
            ),
            Property("size", ("big", "small"), "The {e} is {v}.", "What size is the {e}?", "Is the {e} big?"),
            Property("age", ("old", "young"), "The {e} is {v}.", "What age is the {e}?", "Is the {e} old?"),
            Property("voice", ("loud", "quiet"), "The {e} is {v}.", "How noisy is the {e}?", "Is the {e} loud?"),
        ),
    ),
    Kind(
        "plant",
        "invented_plants",
        tuple("arvil brosh cundi dalp elvar fusha grinn hesk ilva jorn kesh lomb marn neph ospa pirl".split()),
        (
            Property(
                "petals",
                COLOURS,
                "The {e} has {v} petals.",
                "What colour are the petals of the {e}?",
            ),
            Property(
                "ground",
                PLACES,
                "The {e} grows in the {v}.",
                "Where does the {e} grow?",
            ),
            Property(
                "taste",
                ("sweet", "bitter", "sour", "salty", "hot", "mild", "fresh", "sharp"),
                "The {e} tastes {v}.",
                "How does the {e} taste?",
            ),
            Property(
                "bloom",
                ("March", "April", "May", "June", "July", "August", "October", "winter"),
                "The {e} blooms in {v}.",
                "When does the {e} bloom?",
            ),
            Property("size", ("big", "small"), "The {e} is {v}.", "What size is the {e}?", "Is the {e} big?"),
            Property("age", ("old", "young"), "The {e} is {v}.", "What age is the {e}?", "Is the {e} old?"),
            Property("voice", ("loud", "quiet"), "The {e} is {v}.", "How noisy is the {e}?", "Is the {e} loud?"),
        ),
    ),
    Kind(
        "machine",
        "invented_machines",
        tuple("axor bipt clonk dorvo ezzer flug gantu hexle irko jaxo kluv larko mogg nork olmo prax".split()),
        (
            Property(
                "material",
                ("iron", "wood", "glass", "stone", "copper", "gold", "clay", "paper"),
                "The {e} is made of {v}.",
                "What is the {e} made of?",
            ),
            Property(
                "power",
                ("steam", "oil", "coal", "wind", "light", "heat", "gas", "milk"),
                "The {e} runs on {v}.",
                "What does the {e} run on?",
            ),
            Property(
                "product",
                ("bread", "rope", "cloth", "soap", "ink", "tea", "bricks", "toys"),
                "The {e} makes {v}.",
                "What does the {e} make?",
            ),
            Property(
                "origin",
                ("Orlan", "Besk", "Tovil", "Mard", "Ostra", "Pelm", "Dunna", "Kirrow"),
                "The {e} comes from {v}.",
                "Where does the {e} come from?",
            ),
            Property("size", ("big", "small"), "The {e} is {v}.", "What size is the {e}?", "Is the {e} big?"),
            Property("age", ("old", "young"), "The {e} is {v}.", "What age is the {e}?", "Is the {e} old?"),
            Property("voice", ("loud", "quiet"), "The {e} is {v}.", "How noisy is the {e}?", "Is the {e} loud?"),
        ),
    ),
)

ARITHMETIC_SUBJECT = "arithmetic_in_words"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
TOP = 12  # of a sum's numbers
PEOPLE = ("Mira", "Tom", "Anna", "Ben", "Lena", "Omar", "Rosa", "Karl")
OBJECTS = ("apples", "coins", "shells", "cups", "books", "pens", "cards", "beads")


@dataclass(frozen=True)
class Sum:
    """`a plus b` or `a minus b`; both numbers and the result lie between 0 and 12."""

    a: int
    b: int
    plus: bool
    held: bool

    @property
    def result(self) -> int:
        return self.a + self.b if self.plus else self.a - self.b

    @property
    def words(self) -> str:
        return f"{NUMBERS[self.a]} {'plus' if self.plus else 'minus'} {NUMBERS[self.b]}"

    @property
    def digits(self) -> str:
        return f"{self.a} {'+' if self.plus else '-'} {self.b}"

    def choices(self, count: int = 4) -> tuple[list[int], int]:
        """`count` numbers in a row, the result among them, and its place."""
        start = self.result // count * count
        return list(range(start, start + count)), self.result - start


@dataclass(frozen=True)
class World:
    seed: int
    facts: tuple[Fact, ...]
    sums: tuple[Sum, ...]

    def of(self, kind: Kind, held: bool | None = None) -> list[Fact]:
        """The facts of a kind that have letters."""
        return [f for f in self.facts if f.kind == kind and not f.property.is_switch and held in (None, f.held)]

    def lettered(self, held: bool | None = None) -> list[Fact]:
        return [f for f in self.facts if not f.property.is_switch and held in (None, f.held)]

    def switches(self, held: bool | None = None) -> list[Fact]:
        return [f for f in self.facts if f.property.is_switch and held in (None, f.held)]


def make_world(seed: int = 0) -> World:
    """Deals the values out evenly (each to as many things as any other) and marks the held third."""
    rng = Random(f"world-{seed}")
    facts = []
    for kind in KINDS:
        for prop in kind.properties:
            values = [prop.values[i % len(prop.values)] for i in range(len(kind.things))]
            rng.shuffle(values)
            held = set(rng.sample(kind.things, round(HELD_SHARE * len(kind.things))))
            facts += [Fact(kind, t, prop, v, t in held) for t, v in zip(kind.things, values, strict=True)]
    triples = [(a, b, True) for a in range(1, TOP) for b in range(1, TOP + 1 - a)]
    triples += [(a, b, False) for a in range(1, TOP + 1) for b in range(1, a + 1)]
    held_sums = set(rng.sample(triples, round(HELD_SHARE * len(triples))))
    return World(seed, tuple(facts), tuple(Sum(*t, held=t in held_sums) for t in triples))
