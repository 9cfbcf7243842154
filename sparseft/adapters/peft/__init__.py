"""LoRA and DoRA in peft's wrapper: load a folder, switch, fuse, save, and give the base back or merge.

peft writes part of what an adapter trained into the base itself (biases, embeddings that its file holds) and lets
modules that it replaced stay in the model. Here the base's own values are kept aside (`base_values.Overwritten`), so
that the base is the base again, bit for bit, whenever no adapter is active.
"""

from sparseft.adapters.peft.kind import Peft

__all__ = ["Peft"]
