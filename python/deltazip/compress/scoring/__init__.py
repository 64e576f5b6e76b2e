"""How good a compressed variant is: closeness to its fine-tune, task scores, intervals."""
