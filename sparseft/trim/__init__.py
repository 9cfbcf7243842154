"""Cutting a trained adapter back until it forgets no more of a source text than a budget allows."""
