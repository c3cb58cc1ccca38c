"""What several callbacks are made of."""

__all__: list[str] = []
