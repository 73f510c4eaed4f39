"""The training loop, the step program, optimizers, checkpoints, the teacher's cache."""
