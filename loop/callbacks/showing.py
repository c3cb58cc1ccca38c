"""Watch a run as a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from functional_sgd.notebook import notebook
from loop.callback import Callback, Order
from loop.callbacks.parts.displays import Handle
from loop.callbacks.recorder import Recorder
from loop.plots.figure import file_kinds
from loop.plots.runs import plot_losses
from loop.state import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Screen:
    """Where pictures are shown: one place in a notebook, a file, both or none."""

    path: Path | None
    notebook: ModuleType | None = field(default_factory=notebook)
    handle: Handle | None = None

    def show(self, figure: "Figure") -> None:
        """Show a picture in the place of the one before it."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.path)
        if self.notebook is None:
            return
        if self.handle is None:
            self.handle = self.notebook.display(figure, display_id=True)
        else:
            self.handle.update(figure)


@dataclass(frozen=True)
class ShowGraph(Callback):
    """Draw the losses after every epoch, as `plot_losses` does: in a notebook, one picture that
    changes.

    With a `path` (losses.png, .svg, .pdf) the picture is written there too, which works anywhere;
    without one, nothing happens outside notebooks. `skip` leaves out the first batches. Reads all
    losses, so it waits for the device.

    Raises ValueError for a path whose ending is no kind of picture, and for a negative `skip`.
    """

    path: str | Path | None = None
    skip: int = 0
    order: ClassVar[int] = Order.ADAPT
    reports: ClassVar[bool] = True
    run_after: ClassVar[tuple[type, ...]] = (Recorder,)

    def __post_init__(self) -> None:
        if self.path is not None:
            ending = Path(self.path).suffix.removeprefix(".").lower()
            if ending not in file_kinds():
                raise ValueError(
                    f"ShowGraph: path must end in one of .{', .'.join(file_kinds())}, got "
                    f"{str(self.path)!r}."
                )
        if not isinstance(self.skip, int) or self.skip < 0:
            raise ValueError(f"ShowGraph: skip must be a number of batches, got {self.skip!r}.")

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Screen]:
        """Have a place for pictures: a new one for every run."""
        del state  # its tensors would live as long as the run
        path = None if self.path is None else Path(self.path)
        yield Screen(path)

    def after_epoch(self, state: State) -> None:
        """Draw."""
        screen: Screen = state.resources[self.name]
        if (screen.path or screen.notebook) and len(state.history.losses) > self.skip:
            screen.show(plot_losses(state.history, self.skip))
