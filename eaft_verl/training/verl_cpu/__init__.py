"""verl on CPU: a platform it loads as a plug-in, an engine, and every private part of verl behind one check.

Read `private.py` first: nothing else may touch verl's insides.
"""
