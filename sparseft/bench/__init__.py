"""Side-by-side benchmarks, one file each: `train.py` measures a training step of every method."""
