"""What one does with a learner and a state besides training: look, compare, search; nothing is
changed by it.
"""

__all__: list[str] = []
