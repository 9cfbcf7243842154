"""Choosing what trains: how much of what (budget), by which scores (importance/), and the files of what was chosen."""

TOLERANCE = 0.1  # of the trainable weights that a sparsity asks for: what comes of it may be off by as much
