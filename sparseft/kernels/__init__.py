"""The sparse arithmetic: `reference.py` in plain torch, importable everywhere."""
