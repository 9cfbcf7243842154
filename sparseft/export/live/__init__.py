"""Live patching: a trainer's weights, step by step, in a sampler of another process."""
