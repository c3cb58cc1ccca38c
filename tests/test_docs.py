"""What is written for readers runs: examples in docstrings, and the blocks of README.md
and docs/.
"""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import functional_sgd
import loop
from functional_sgd import Rule
from tests.each import for_each

ROOT = Path(__file__).parent.parent
PARSER = doctest.DocTestParser()


PACKAGES = (functional_sgd, loop)
NAMES = [package.__name__ for package in PACKAGES] + [
    found.name
    for package in PACKAGES
    for found in pkgutil.walk_packages(
        package.__path__, f"{package.__name__}.", onerror=lambda _: None
    )
]


def modules() -> Iterator[ModuleType]:
    """Those that can be imported; a test finds the others."""
    for name in NAMES:
        with contextlib.suppress(Exception):
            yield importlib.import_module(name)


@for_each("name", NAMES)
def test_every_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def docstrings_of(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(where, text) of the module and of what is defined in it: functions, rules, classes and their
    members.
    """
    yield module.__name__, module.__doc__ or ""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        where = f"{module.__name__}.{name}"
        if inspect.isclass(value):
            yield from docstrings_of_class(where, value)
        elif inspect.isroutine(value) or isinstance(value, Rule):
            yield where, value.__doc__ or ""


def docstrings_of_class(where: str, cls: type) -> Iterator[tuple[str, str]]:
    """(where, text) of a class and of its own members."""
    yield where, cls.__doc__ or ""
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isroutine(function) or isinstance(function, property):
            yield f"{where}.{name}", function.__doc__ or ""


EXAMPLES = {
    where: (text, module)
    for module in modules()
    for where, text in docstrings_of(module)
    if ">>>" in text
}


def run_examples(where: str, text: str, names: dict[str, Any]) -> None:
    """Fail, and show what came out, unless every example in the text gives what it says."""
    report: list[str] = []
    test = PARSER.get_doctest(text, names, where, None, 0)
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples may write files, elsewhere; and leave the random numbers as they were."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("where", EXAMPLES)
def test_examples_in_docstrings(where: str) -> None:
    text, module = EXAMPLES[where]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run_examples(where, text, {**vars(module), "torch": torch})


PUBLIC = [name for name in functional_sgd.__all__ if name != "__version__"]


def test_everything_that_can_be_imported_from_the_package_is_public() -> None:
    names = {
        name
        for name, value in vars(functional_sgd).items()
        if name[0] != "_" and not inspect.ismodule(value)
    }
    assert names - {"TYPE_CHECKING"} == set(PUBLIC)


def examples_of(value: Any) -> str:
    """The docstring; of a class, with those of its members."""
    if inspect.isclass(value):
        return "\n".join(text for _, text in docstrings_of_class("", value))
    return value.__doc__ or ""


@for_each(
    "name",
    [name for name in PUBLIC if not getattr(getattr(functional_sgd, name), "_is_protocol", 0)],
)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>>" in examples_of(getattr(functional_sgd, name))


def test_examples_of_rules_and_methods_are_among_those_that_run() -> None:
    assert {
        "functional_sgd.rules.averaging.average_grad",
        "functional_sgd.chaining.Chain.describe",
    } <= EXAMPLES.keys()


@dataclass(frozen=True)
class Block:
    """Some code of a page, and the packages that only it needs."""

    line: int
    code: str
    needs: tuple[str, ...]


def blocks_of(file: Path) -> list[Block]:
    """Every ```python block; one that begins with ```python needs=a,b is for those who have a and
    b.
    """
    text = file.read_text()
    found = re.finditer(
        r"^```python(?: needs=(\S+))?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    )
    return [
        Block(
            text.count("\n", 0, match.start(2)),
            match.group(2),
            tuple(match.group(1).split(",")) if match.group(1) else (),
        )
        for match in found
    ]


def run_block(page: Path, block: Block, names: dict[str, Any]) -> None:
    """In this namespace; errors have the page's name and line."""
    if block.code.lstrip().startswith(">>>"):
        run_examples(f"{page.name}:{block.line}", block.code, names)
    else:
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
    if "generated" not in page.parts and blocks_of(page)
]
WITH_OTHERS = [(page, block) for page in PAGES for block in blocks_of(page) if block.needs]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page_run_one_after_the_other(page: Path) -> None:
    """In one namespace: later blocks may use what earlier ones made."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks_of(page):
            if not block.needs:
                run_block(page, block, names)


@pytest.mark.parametrize(
    ("page", "block"),
    WITH_OTHERS,
    ids=[f"{page.relative_to(ROOT)}:{block.line}" for page, block in WITH_OTHERS],
)
@pytest.mark.filterwarnings("ignore")  # of what the other package does
def test_blocks_that_need_another_package(page: Path, block: Block) -> None:
    """After those before it that need none."""
    for name in block.needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for other in blocks_of(page):
            if other == block:
                run_block(page, block, names)
                return
            if not other.needs:
                run_block(page, other, names)
