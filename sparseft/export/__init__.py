"""What other tools load of a run or an adapter folder, and the proof that it is the same there."""

NOTE = "sparseft_export.json"  # in every export: what it is of, and how near it came; by it a folder may be replaced
README = "README.md"
