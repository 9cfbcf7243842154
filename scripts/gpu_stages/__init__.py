"""What `scripts/gpu_session.py` runs: the runner, and the stages one file each."""
