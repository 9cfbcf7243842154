"""Learning which of two answers is better: TRL's trainers and losses in the run that imitation has."""
