"""The training loop itself: its drawing, and the machine that follows it."""

__all__: list[str] = []
