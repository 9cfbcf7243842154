"""Talking to a model in the terminal or through a pipe: who answers, how questions are put, what is shown."""
