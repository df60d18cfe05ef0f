"""The fault matrix: every row breaks something, drives the real program, and asserts what must be seen.

`python -m tests.faults [pytest arguments]` runs all rows and prints the table; CI runs those that are not slow.
"""
