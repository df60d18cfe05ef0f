"""A package, because verl installs one of this name: `python -m tests.faults` must find this one."""
