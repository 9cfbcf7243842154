"""What was trained, on a model and in files."""
