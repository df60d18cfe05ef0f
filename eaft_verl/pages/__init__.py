"""What every page is made of: numbers in words, intervals, colours, the look of figures, the HTML around it all.

May import the root; no torch. Read `shell.py` first.
"""
