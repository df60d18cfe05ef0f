"""Entropy-adaptive fine-tuning on verl: train, compare and prove what was forgotten."""

__version__ = "0.1.0"
