"""Training data: rows in any chat format become verl's `messages` parquet, tokens, a loss mask and a manifest.

May import grading and below; no torch, libraries late. Read `prepare.py` first, then `formats.py` and `encode.py`.
"""
