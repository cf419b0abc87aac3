"""On the GPUs: the loop, losses, optimizers, checkpoints."""
