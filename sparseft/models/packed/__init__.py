"""Bases whose linears hold packed weights: of bitsandbytes, torchao or GGUF."""
