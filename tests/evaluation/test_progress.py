"""What is shown while questions are answered."""

from __future__ import annotations

import pytest

from sparseft.evaluation.progress import Answers


def test_each_model_s_answers_are_counted_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with Answers() as answers:
        for who in ("base", "adapter"):
            answers.prepare(who)
            answers("Tokenizing inputs", 1, 2)
            for done in (0, 4, 8):
                answers("Running loglikelihood requests", done, 8)
            for done in (0, 2):
                answers("Running generate_until requests", done, 2)
    assert capsys.readouterr().err.splitlines() == [
        "base answers: 8/8 choices, in 0:00",
        "base answers: 2/2 texts, in 0:00",
        "adapter answers: 8/8 choices, in 0:00",
        "adapter answers: 2/2 texts, in 0:00",
    ]


def test_an_interrupted_count_ends_its_display(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Answers("base") as answers:
        answers("Running loglikelihood requests", 3, 8)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["base answers: 3/8 choices (37 %), in 0:00"]
