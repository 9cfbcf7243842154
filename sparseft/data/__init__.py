"""Training data: files and hub sets -> records -> examples -> token ids and labels -> batches."""
