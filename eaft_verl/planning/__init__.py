"""Memory, disk and time of an arm before anything runs; no model is loaded.

May import recipe and below; no torch. Read `arm_plan.py` first; `formulas.py` holds the arithmetic of a device.
"""
