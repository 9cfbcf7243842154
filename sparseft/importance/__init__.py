"""How much a unit (head, channel, row, column or block) matters: scores that `selection/` ranks."""
