"""The brackets of callbacks: opened one after the other, closed in reverse order, always."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

from loop.state import State

Explain = Callable[..., None]
"""explain(error, where, spare=True) adds to an error where it was raised."""


class Bracket(AbstractContextManager[object]):
    """A context manager that has what it raises while it closes explained.

    What passes through it was raised by somebody else, and is left alone.
    """

    def __init__(
        self, manager: AbstractContextManager[object], explain: Callable[[Exception], None]
    ) -> None:
        self.manager, self.explain = manager, explain

    def __enter__(self) -> object:
        return self.manager.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        passing: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return self.manager.__exit__(kind, passing, traceback)
        except Exception as error:
            if error is not passing:
                self.explain(error)
            raise


def opened(
    methods: Iterable[tuple[str, Callable[[State], Any]]],
    place: str,
    state: State,
    explain: Explain,
    lend: bool,
) -> tuple[ExitStack, State]:
    """What closes the brackets that these methods make, all of them open now; and the state.

    With `lend`, what each bracket yields is in state.resources, for those that open after it too.
    """
    with ExitStack() as stack:
        for owner, method in methods:
            where = f"by callback {owner!r} in {place}"
            try:
                manager = method(state)
                check_manager(owner, place, manager)
                # Not spared when the run was told to stop: what fails to close may be a checkpoint.
                closing = partial(explain, where=f"{where}, closing", spare=False)
                resource = stack.enter_context(Bracket(manager, closing))
            except Exception as error:
                explain(error, where)
                raise
            if lend:
                state = state.replace(resources={**state.resources, owner: resource})
        # All are open, so the caller closes them. If one fails to open, `with` closes those before
        # it.
        return stack.pop_all(), state


def check_manager(owner: str, place: str, manager: object) -> None:
    """Raise TypeError unless this can be entered and left."""
    if hasattr(manager, "__enter__") and hasattr(manager, "__exit__"):
        return
    raise TypeError(
        f"callback {owner!r} returned {type(manager).__name__} from {place}: expected a context "
        f"manager. Write @contextmanager above it and yield once in it, or return nullcontext()."
    )
