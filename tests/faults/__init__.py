"""Faults from outside: kills, full disks, other users, damaged and made-up files, dead loaders.

`make faults` runs the long form (FAULTS=long): a thousand kills, every bit of every file.
"""
