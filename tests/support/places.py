"""Where the project lies, and what may lie beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout
SUPPORT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"  # real models and data; tests that want them skip without
