"""A batch in words, for an error message or a callback that prints it."""

from functional_sgd.outputs import map_output
from loop.state import State


def shapes(state: State) -> str:
    """The shapes in a batch: its inputs, its targets and the prediction."""
    named = {"xb": state.xb, "yb": state.yb, "pred": state.pred}
    texts = []
    for name, value in named.items():
        if value is not None:
            texts.append(f"{name}: {map_output(_shape, value)}")
    return ", ".join(texts)


def _shape(value: object) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
