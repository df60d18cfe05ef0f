"""Where a recipe runs: here, or handed to Ray jobs, Slurm, KubeRay or SkyPilot.

May import everything but cli, and ray for its jobs. Read `places.py` first.
"""
