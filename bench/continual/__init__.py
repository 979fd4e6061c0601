"""Learning classes one group after another: the problems, and ours and its rivals."""
