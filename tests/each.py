"""Many cases in one test: collecting and reporting thousands would take longer than they do."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

Test = Callable[..., None]


def for_each(name: str, values: Iterable[Any]) -> Callable[[Test], Test]:
    """As `pytest.mark.parametrize(name, values)`, but one test, which says in which case it has
    failed. What fixtures give it is the same in every case.
    """
    cases = list(values)

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def every(*args: Any, **fixtures: Any) -> None:
            assert cases, "a test without cases cannot fail"
            for case in cases:
                try:
                    test(*args, **fixtures, **{name: case})
                except Exception as error:
                    error.add_note(f"in the case {name} = {case!r}")
                    raise

        signature = inspect.signature(test)
        others = [one for one in signature.parameters.values() if one.name != name]
        every.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return every

    return decorate
