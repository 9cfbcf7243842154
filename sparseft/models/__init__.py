"""The base model: loading it, and what its modules are."""
