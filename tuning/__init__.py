"""Measuring and training: the evaluation grid, question answering, adapters."""
