"""Pages that are computed: every public name by theme, and the catalogue of optimizers."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from names import TABLES, table

import functional_sgd
import loop
import loop.losses
import loop.metrics
from functional_sgd import Recipe, Reduction, recipes, schedules

THEMES = {
    "rules": ("Rules", ["functional_sgd.rules."]),
    "catalogue": (
        "Recipes",
        ["functional_sgd.catalogue.", "functional_sgd.listing", "functional_sgd.lbfgs"],
    ),
    "wrappers": ("Wrappers", ["functional_sgd.wrappers."]),
    "writing": (
        "Write a rule, build a chain",
        [
            "functional_sgd.rule",
            "functional_sgd.chaining",
            "functional_sgd.eight_bit",
            "functional_sgd.reduction",
            "functional_sgd.randomness",
            "functional_sgd.rounding",
            "functional_sgd.hyper",
            "functional_sgd.trial",
            "functional_sgd.optimizer",
            "functional_sgd.state",
        ],
    ),
    "speed": (
        "Run it fast",
        ["functional_sgd.fusion.", "functional_sgd.compile.", "functional_sgd.packing"],
    ),
    "gradients": (
        "Modules and gradients",
        ["functional_sgd.autodiff", "functional_sgd.per_example"],
    ),
    "bridge": ("To and from torch.optim", ["functional_sgd.bridge."]),
    "schedules": ("Schedules", ["functional_sgd.schedules"]),
    "training": (
        "Train, validate, predict",
        ["loop.training.", "loop.learner", "loop.state", "loop.history"],
    ),
    "data": ("Data", ["loop.data."]),
    "callbacks": ("Callbacks", ["loop.callbacks.", "loop.callback", "loop.layer_stats"]),
    "events": ("Events and signals", ["loop.run."]),
    "disk": ("Files", ["loop.disk."]),
    "tools": ("Tools", ["loop.tools.", "loop.layer_groups"]),
    "plots": ("Pictures", ["loop.plots."]),
    "metrics": ("Metrics", ["loop.metrics"]),
    "losses": ("Losses", ["loop.losses"]),
    "others": ("Everything else", [""]),
}
"""page -> (title, modules): a name belongs to the first theme that its module begins with."""


def public_names() -> Iterator[tuple[str, Any]]:
    """(full name, value) of everything that is public, each once."""
    for module in (functional_sgd, loop, schedules, loop.metrics, loop.losses):
        for name in names_of(module):
            if module is loop or not hasattr(loop, name) or not is_part_of(module, loop):
                yield f"{module.__name__}.{name}", getattr(module, name)


def is_part_of(module: ModuleType, package: ModuleType) -> bool:
    """Whether the package shows names of this module too."""
    return module.__name__.startswith(f"{package.__name__}.")


def names_of(module: ModuleType) -> list[str]:
    """What the module says is public, or what it defines."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [
            name
            for name, value in vars(module).items()
            if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
        ]
    return [name for name in listed if name != "__version__"]


def theme_of(name: str, value: Any) -> str:
    """The page that a name is on: by the module that made it."""
    made_in = getattr(value, "__module__", None)
    # What is made elsewhere (a type alias) belongs where it is shown.
    if not str(made_in).startswith(("functional_sgd", "loop")):
        made_in = name.rpartition(".")[0]
    for page, (_, modules) in THEMES.items():
        if any(f"{made_in}.".startswith(module) for module in modules):
            return page
    raise AssertionError(name)


def names_by_theme() -> dict[str, list[tuple[str, Any]]]:
    """Every page with its names, sorted."""
    pages: dict[str, list[tuple[str, Any]]] = {page: [] for page in THEMES}
    for name, value in public_names():
        pages[theme_of(name, value)].append((name, value))
    return {
        page: sorted(names, key=lambda one: (section_of(page, one[1]), short(one[0]).lower()))
        for page, names in pages.items()
        if names
    }


def short(name: str) -> str:
    """Its last part."""
    return name.rpartition(".")[2]


def section_of(page: str, value: Any) -> str:
    """The heading above a name, on pages with many: the file that it is defined in."""
    if page not in ("rules", "catalogue"):
        return ""
    return str(value.__module__).rpartition(".")[2].replace("_", " ").capitalize()


def write_pages(folder: Path) -> None:
    """Write all of them; a file that would not change keeps its date, so builds stay short."""
    pages = names_by_theme()
    _write(folder / "api" / "index.md", api_index(pages))
    for page, names in pages.items():
        _write(folder / "api" / f"{page}.md", api_page(page, names))
    _write(folder / "catalogue.md", catalogue_page())
    for title, rows in TABLES.items():
        _write(folder / f"from_{title}.md", table(title.replace("_", "."), rows))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def api_index(pages: dict[str, list[tuple[str, Any]]]) -> str:
    """All names on one page, by theme, each a link to its place."""
    lines = ["# All names", ""]
    for page, names in pages.items():
        links = (f"[`{short(name)}`](#{name})" for name, _ in names)
        lines += [f"**[{THEMES[page][0]}]({page}.md)**: {', '.join(links)}.", ""]
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *pages, "```", ""])


def api_page(page: str, names: list[tuple[str, Any]]) -> str:
    """One theme, every name with its docstring."""
    lines, section = [f"# {THEMES[page][0]}", ""], ""
    for name, value in names:
        if section_of(page, value) != section:
            section = section_of(page, value)
            lines += [f"## {section}", ""]
        # The directives of autodoc are written in reStructuredText, which is what docstrings
        # are turned into.
        lines += ["```{eval-rst}", *directive(name, value), "```", ""]
    return "\n".join(lines)


def directive(name: str, value: Any) -> list[str]:
    """What tells autodoc to document this."""
    if inspect.isclass(value):
        return [f".. autoclass:: {name}"]
    if callable(value) and (inspect.isroutine(value) or hasattr(value, "__signature__")):
        # A rule is called like the function that it was made of; autodoc would take it for data.
        signature = inspect.signature(value)
        plain = signature.replace(
            parameters=[bare(one) for one in signature.parameters.values()],
            return_annotation=signature.empty,
        )
        text = docstring_lines(inspect.getdoc(value) or "")
        return [f".. py:function:: {name}{plain}", "", *(f"   {line}" for line in text)]
    return [f".. py:data:: {name}", "", f"   ``{value}``".replace("typing.", "")]


def bare(parameter: inspect.Parameter) -> inspect.Parameter:
    """Its name and its default, as short as they can be."""
    default = parameter.default
    if isinstance(default, Reduction):
        default = Shown(f"{default.over} {default.combine}")
    return parameter.replace(annotation=parameter.empty, default=default)


class Shown:
    """A default whose own text is too long."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<{self.text}>"


def as_restructured_text(
    app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text with `code`, indented formulas and examples."""
    lines[:] = docstring_lines("\n".join(lines))


def docstring_lines(text: str) -> list[str]:
    """The same text as reStructuredText: paragraphs, literal blocks, examples."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if not block.strip():
            continue
        if block.lstrip().startswith(">>>"):
            lines += ["", *inspect.cleandoc(block).splitlines(), ""]
        elif block.startswith(" "):
            lines += ["", "::", "", *(f"   {line}" for line in block.splitlines()), ""]
        else:
            # One line: indented ones would be a quotation, and a minus at the start a list.
            lines += ["", prose(" ".join(line.strip() for line in block.splitlines())), ""]
    return lines


def prose(line: str) -> str:
    """`code` is literal; nothing else has a meaning of its own."""
    parts = re.split(r"(`[^`]+`)", line)
    escaped = [re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts]
    # A literal must stand apart from the letters around it.
    return "".join(
        f"\\ `{part}`\\ " if part.startswith("`") else other
        for part, other in zip(parts, escaped, strict=True)
    )


def point_outside(app: Any, page: str, source: list[str]) -> None:
    """Links from docs/ to other files of the repository (README, tests, results) become text: the
    site has the pages only.
    """
    source[0] = re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)[^)]*\)", r"\1", source[0])


def catalogue_page() -> str:
    """What every optimizer is, and what it costs, family by family."""
    lines = [
        "# The catalogue",
        "",
        "Computed from `functional_sgd.recipes()` when this site is built. Costs are those of a",
        "fused step on float32 parameters: bytes of state for each parameter, passes over memory,",
        "and bytes read and written for each parameter. Plain SGD moves 12: it reads parameter and",
        "gradient, and writes the parameter.",
        "",
    ]
    families: dict[str, list[Recipe]] = {}
    for recipe in recipes().values():
        families.setdefault(recipe.family, []).append(recipe)
    for family, members in sorted(families.items()):
        lines += [
            f"## {family.replace('_', ' ').capitalize()}",
            "",
            "| name | what it does | source | state, bytes | passes | moved, bytes |",
            "|---|---|---|---|---|---|",
            *map(catalogue_row, members),
            "",
        ]
    return "\n".join(lines)


def catalogue_row(recipe: Recipe) -> str:
    """One optimizer."""
    passes = "" if recipe.passes is None else str(recipe.passes)
    if recipe.by_torch:
        passes += f", and torch for {', '.join(recipe.by_torch)}"
    cells = (
        f"[`{recipe.name}`](#functional_sgd.{recipe.name})",
        recipe.title,
        recipe.source,
        f"{recipe.memory:g}",
        passes,
        "" if recipe.moved is None else f"{recipe.moved:g}",
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
