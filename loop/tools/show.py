"""Print the loop as it will run: every event, and which callbacks are called there."""

from collections.abc import Iterator, Sequence

from loop.callback import in_order, name_of
from loop.learner import Learner
from loop.run.events import FIT, Event, Scope, Stage
from loop.training.fit import with_recorder


def show_loop(learner: Learner) -> None:
    """Print the scopes, stages and events of `fit`, with the callbacks at each place in the order
    of their call.

    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders, GradientClip
    >>> import torch
    >>> model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    >>> learner = Learner(model, DataLoaders([1]), loss, sgd(), callbacks=[GradientClip()])
    >>> show_loop(learner)  # doctest: +ELLIPSIS
    fit
      before_fit: recorder
      epoch  (for each epoch)
        before_epoch
    ...
            step  (if there are gradients)
              before_step: gradient_clip
              [update]
    ...
    """
    print("\n".join(_lines(FIT, in_order(with_recorder(learner.callbacks)), "")))


def _lines(scope: Scope, callbacks: Sequence[object], indent: str) -> Iterator[str]:
    first = indent + scope.name
    conditions = ", ".join(filter(None, (scope.repeat, scope.when)))
    if conditions:
        first += f"  ({conditions})"
    around = _called(callbacks, f"around_{scope.name}")
    if around:
        first += f"  around it{around}"
    yield first
    inner = indent + "  "
    yield inner + scope.before + _called(callbacks, scope.before)
    for part in scope.parts:
        if isinstance(part, Scope):
            yield from _lines(part, callbacks, inner)
        elif isinstance(part, Event):
            yield inner + part.name + _called(callbacks, part.name)
        elif isinstance(part, Stage):
            yield f"{inner}[{part.name}]"
    if _called(callbacks, scope.cancelled):
        yield inner + scope.cancelled + _called(callbacks, scope.cancelled)
    yield inner + scope.after + _called(callbacks, scope.after)


def _called(callbacks: Sequence[object], place: str) -> str:
    """ ": ", and who is called there; nothing if nobody is."""
    called = [one for one in callbacks if callable(getattr(one, place, None))]
    if not called:
        return ""
    return f": {', '.join(map(name_of, called))}"
