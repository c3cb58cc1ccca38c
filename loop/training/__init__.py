"""Ways to start the machine: fit, validate, predict, fine_tune and their kin."""

__all__: list[str] = []
