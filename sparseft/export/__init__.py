"""What other tools load of a run or an adapter folder, and the proof that it is the same there."""
