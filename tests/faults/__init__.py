"""Faults from outside: kills of one process, and of some of several; full disks, other users,
damaged and made-up files, dead loaders.

`make faults` runs the long form (FAULTS=long): thousands of kills, every bit of every file.
"""
