"""Evaluation through lm-eval: MMLU, the commonsense and arithmetic sets, MT-Bench, and any task of lm-eval itself."""
