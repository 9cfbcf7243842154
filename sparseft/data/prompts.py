"""The prompts, written once: training (`data/`) and evaluation (`evaluation/`) both read them here.

A prompt that differs between the two silently costs accuracy, so nothing else may spell one out.
"""

from __future__ import annotations

from collections.abc import Iterable

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

ALPACA_INSTRUCTION = "### Instruction"  # where a model that goes on begins a question of its own
ALPACA_RESPONSE = "### Response"  # and, half trained, another answer

# Guanaco's turns. A prompt ends with `### Assistant:`; the space that follows belongs to the answer, where a tokenizer
# can join it to the first word. The same holds for plain chats.
HUMAN = "### Human:"
ASSISTANT = "### Assistant:"

PLAIN_USER = "User:"
PLAIN_ASSISTANT = "Assistant:"
PLAIN_BREAK = "\n\n"  # between two messages of a plain chat

# Where an answer ends for a model that goes on, by the form of the prompt; a chat template has a token for it.
STOPS = {
    "alpaca": [ALPACA_INSTRUCTION, ALPACA_RESPONSE],
    "guanaco": [HUMAN, ASSISTANT],
    "plain": [PLAIN_BREAK + PLAIN_USER],
    "chat": [],
    "raw": [],
}
AS_MESSAGES = "messages"  # the form of a run on chats: `chat` where the tokenizer has a template, else `plain`

# The first words of LLM-Adapters' questions with a choice of answers.
CHOOSE_ANSWER = "Please choose the correct answer to the question: "
CHOOSE_SOLUTION = "Please choose the correct solution to the question: "
CHOOSE_ENDING = "Please choose the correct ending to complete the given sentence: "
CHOOSE_OPTION = "Please choose the correct answer to fill in the blank to complete the given sentence: "


def alpaca_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """The Alpaca prompt up to and including `### Response:` and a newline (Taori et al. 2023).

    A system message takes the place of the words before the first `###`.
    """
    prompt = (ALPACA_WITH_INPUT if input else ALPACA).format_map({"instruction": instruction, "input": input})
    return system.rstrip() + prompt[prompt.index("\n\n### ") :] if system.strip() else prompt


def alpaca_conversation(history: Iterable[tuple[str, str]], instruction: str, input: str = "", system: str = "") -> str:
    """The Alpaca prompt behind earlier questions and their answers; only the first question has the words before it."""
    text = ""
    for question, answer in history:
        text += _alpaca_turn(text, question, "", system) + answer.rstrip()
    return text + _alpaca_turn(text, instruction, input, system)


def _alpaca_turn(before: str, instruction: str, input: str, system: str) -> str:
    if not before:
        return alpaca_prompt(instruction, input, system)
    prompt = alpaca_prompt(instruction, input)
    return prompt[prompt.index("\n\n### ") :]


def human_turn(text: str) -> str:
    """A question in the guanaco format."""
    return f"{HUMAN} {text}"


def guanaco_conversation(history: Iterable[tuple[str, str]], question: str, system: str = "") -> str:
    """Guanaco's turns up to and including the `### Assistant:` that asks for an answer to `question`."""
    text = f"{system.rstrip()}\n" if system.strip() else ""
    for asked, answered in history:
        text += f"{human_turn(asked)}{ASSISTANT} {answered}"
    return text + human_turn(question) + ASSISTANT


def plain_conversation(history: Iterable[tuple[str, str]], question: str, system: str = "") -> str:
    """A plain chat up to and including the `Assistant:` that asks for an answer to `question`."""
    blocks = [system] if system.strip() else []
    for asked, answered in history:
        blocks += [f"{PLAIN_USER} {asked}", f"{PLAIN_ASSISTANT} {answered}"]
    return PLAIN_BREAK.join([*blocks, f"{PLAIN_USER} {question}", PLAIN_ASSISTANT])


def plain_turn(role: str, text: str) -> str:
    """A message of a plain chat that is not learnt: with its role before it, but for instructions to the model."""
    return text if role in ("system", "developer") else f"{role.capitalize()}: {text}"


def true_or_false(question: str) -> str:
    """LLM-Adapters' instruction for a question (without its mark) to be answered with true or false."""
    head = "Please answer the following question with true or false, question: "
    return f"{head}{question}?\n\nAnswer format: true/false"


def choose(head: str, label: str, texts: list[str], separator: str = " ", before_format: str = "\n\n") -> str:
    """LLM-Adapters' instruction for a choice: `head`, `Answer1: … Answer2: …`, `Answer format: answer1/answer2`."""
    listed = separator.join(f"{label.capitalize()}{place}: {text}" for place, text in enumerate(texts, 1))
    names = "/".join(f"{label}{place}" for place in range(1, len(texts) + 1))
    return f"{head}\n\n{listed}{before_format}Answer format: {names}"


def answer_choices(question: str, options: Iterable[tuple[str, str]]) -> str:
    """LLM-Adapters' instruction for AQuA: the options, (letter, text), behind the question."""
    return f"{question} Answer Choices: {' '.join(f'({letter}) {text}' for letter, text in options)}"


def mmlu_header(subject: str) -> str:
    """The line before MMLU's shots (Hendrycks et al. 2021, evaluate.py); `subject` as in the file names."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def mmlu_question(question: str, choices: list[str]) -> str:
    """One MMLU question up to and including `Answer:`; the answer follows after one space."""
    lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))]
    return "\n".join(lines) + "\nAnswer:"
