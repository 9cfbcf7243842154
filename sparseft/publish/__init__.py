"""What is published of a run: a model card, and the files, sent to the Hugging Face hub."""
