"""Which tokens a loss counts."""

IGNORED = -100  # the label of those that it does not, as torch's cross entropy has it
