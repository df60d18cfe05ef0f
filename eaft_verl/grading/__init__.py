"""Whether an answer is right: text in, score out, without running anything a model wrote.

Imports no torch and nothing above. Read `graders.py` first; `answers.py` finds the answer in a text,
`numbers.py` and `letters.py` read it.
"""
