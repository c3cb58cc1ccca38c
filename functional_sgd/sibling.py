"""Notice when something else of the name `loop` hides the package that comes with this one."""

import warnings
from importlib.util import find_spec
from pathlib import Path


def hidden_by(name: str = "loop", known_by: str = "run/machine.py") -> str | None:
    """The file that `import loop` would load instead of ours; None if all is well.

    >>> hidden_by() is None, hidden_by("json") is None
    (True, False)
    """
    try:
        spec = find_spec(name)
    except ValueError:  # somebody has made a module of this name by hand
        return name
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / known_by).exists() for folder in folders):
        return None
    return spec.origin or ", ".join(map(str, folders))


def warn_if_hidden() -> None:
    """Say that a script's neighbour, such as loop.py, hides the loop: it goes before packages."""
    found = hidden_by()
    if found is not None:
        warnings.warn(
            f"functional_sgd: `import loop` gives {found}, which hides the package `loop` that "
            f"comes with functional_sgd. Rename it, if you want to use that one.",
            stacklevel=3,
        )
