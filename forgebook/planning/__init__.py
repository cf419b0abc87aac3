"""Before a GPU is paid for: tokens, memory, time, cost, what fits, what `--default` chooses."""
