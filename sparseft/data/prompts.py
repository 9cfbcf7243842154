"""The prompts, written once: training (`data/`) and evaluation (`evaluation/`) both read them here.

A prompt that differs between the two silently costs accuracy, so nothing else may spell one out.
"""

from __future__ import annotations

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

HUMAN = "### Human:"
ASSISTANT = "### Assistant:"


def alpaca_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """The Alpaca prompt up to and including `### Response:` and a newline (Taori et al. 2023).

    A system message takes the place of the words before the first `###`.
    """
    prompt = (ALPACA_WITH_INPUT if input else ALPACA).format_map({"instruction": instruction, "input": input})
    return system.rstrip() + prompt[prompt.index("\n\n### ") :] if system.strip() else prompt


def alpaca_follow_up(instruction: str, input: str = "") -> str:
    """What follows an answer to ask for the next one: the Alpaca prompt without its first words."""
    prompt = alpaca_prompt(instruction, input)
    return prompt[prompt.index("\n\n### ") :]


def mmlu_header(subject: str) -> str:
    """The line before MMLU's shots (Hendrycks et al. 2021, evaluate.py); `subject` as in the file names."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def mmlu_question(question: str, choices: list[str]) -> str:
    """One MMLU question up to and including `Answer:`; the answer follows after one space."""
    lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))]
    return "\n".join(lines) + "\nAnswer:"
