"""States on disk: encoded, in verified files, in directories that are whole or not there."""

__all__: list[str] = []
