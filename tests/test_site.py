"""The site in docs/: its links, its checklist, and the pages that are computed."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import functional_sgd
import loop
from tests.each import for_each

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in DOCS.glob("**/*.md") if not {"generated", "build"} & {*page.parts}]


@pytest.fixture(scope="module")
def computed() -> Iterator[ModuleType]:
    """docs/computed.py; it and docs/names.py are forgotten afterwards, as their names are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("computed")
    for name in ("computed", "names"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def names(computed: ModuleType) -> ModuleType:
    """docs/names.py."""
    return sys.modules["names"]


# Links.


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_to_files_lead_somewhere(page: Path, computed: ModuleType) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    made = {"catalogue.md", "kernels.png", "optimizers.png", "momentum.png", "betas.png"}
    made |= {"loop.png", "index.md"} | {f"{theme}.md" for theme in computed.THEMES}
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" in link:
            continue
        target = (page.parent / link).resolve()
        assert target.exists() or ("generated" in target.parts and target.name in made), link


def test_every_page_is_in_the_table_of_contents() -> None:
    found = set()
    for page in PAGES:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S):
            lines = [line for line in block.splitlines() if line and line[0] != ":"]
            found |= {(page.parent / f"{line}.md").resolve() for line in lines}
    assert {page.resolve() for page in PAGES} - found == {DOCS / "index.md"}


# Examples and callbacks.

EXAMPLES = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("notebooks/*.ipynb")]


@for_each("path", sorted(EXAMPLES))
def test_every_example_is_on_its_page_with_its_command(path: Path) -> None:
    """Or, if it is a part of others, among those."""
    text = (DOCS / "examples.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(f"| [{path.name}](")]
    if path.suffix == ".py" and "def main" not in path.read_text():
        assert rows == []
        assert f"`{path.name}`" in text
        return
    started = path if path.suffix == ".py" else path.parent
    assert len(rows) == 1
    assert f"{started.relative_to(ROOT)}` |" in rows[0]


def test_the_page_of_callbacks_says_what_a_batch_has_at_each_event() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (`xb`[^|]*) \|", (DOCS / "callbacks.md").read_text(), flags=re.MULTILINE
    )
    x = torch.ones(2, 1)
    data = loop.DataLoaders([(x, x)], [(x, x)])
    model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    learner = loop.Learner(model, data, loss, functional_sgd.sgd(lr=0.1))
    found: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for event, state in loop.trace(learner, learner.init()):
        names = ("xb", "yb", "pred", "loss", "grads")
        there = [f"`{name}`" for name in names if getattr(state, name) is not None]
        if there:
            found[state.training][event] = ", ".join(there)
    assert found[True] == dict(rows)
    assert found[False] == {
        event: there.removesuffix(", `grads`")
        for event, there in rows
        if event in ("before_batch", "after_pred", "after_loss", "after_batch")
    }


# The checklist.

ROWS = [
    "Q1b",
    *(f"Q{number}" for number in range(1, 28)),
    *(f"FR{number}" for number in range(1, 5)),
    *(f"R{number}" for number in range(1, 5)),
    *(f"B{number}" for number in range(1, 44)),
    *(f"L{number}" for number in range(1, 41)),
    *(f"N{number}" for number in range(1, 60)),
    *(f"X{number}" for number in range(1, 9)),
]
CHECKLIST = dict(
    re.findall(r"^\| (\w+) \| [^|]+ \| ([^|]+) \|$", (DOCS / "checklist.md").read_text(), re.M)
)


def test_the_checklist_has_every_row_once() -> None:
    listed = re.findall(r"^\| ([A-Z]+\d+b?) \|", (DOCS / "checklist.md").read_text(), re.M)
    assert sorted(listed) == sorted(ROWS)


@for_each("row", ROWS)
def test_what_meets_a_row_is_there(row: str) -> None:
    """Tests by file and name, or files; links are tested above."""
    met_by = CHECKLIST[row]
    assert "`" in met_by or "](" in met_by
    for reference in re.findall(r"`([^`]+)`", met_by):
        file, _, test = reference.partition("::")
        assert (ROOT / file).is_file(), reference
        assert not test or f"def {test}(" in (ROOT / file).read_text(), reference


@for_each("row", [row for row in ROWS if row[0] in "QRBLN"])
def test_a_page_of_the_course_speaks_of_a_row(row: str) -> None:
    """By its number; or, the questions and the chapter, by what they have in order."""
    linked = re.findall(r"\]\((course/\w+\.md)\)", CHECKLIST[row])
    assert linked
    if row[0] in "LN":
        text = " ".join((DOCS / page).read_text() for page in linked)
        rows = {
            f"{row[0]}{number}"
            for first, last in re.findall(rf"\[{row[0]}(\d+) to {row[0]}(\d+)\]", text)
            for number in range(int(first), int(last) + 1)
        }
        assert row in rows or re.search(rf"\b{row}\b", text)


# What is computed.


def test_every_public_name_is_on_one_page(computed: ModuleType) -> None:
    pages = computed.names_by_theme()
    listed = [name for names in pages.values() for name, _ in names]
    assert len(listed) == len({*listed})
    for package in (functional_sgd, loop):
        public = {f"{package.__name__}.{name}" for name in package.__all__} - {
            f"{package.__name__}.__version__"
        }
        assert public <= {*listed}
    for page, names in pages.items():
        text = computed.api_page(page, names)
        directives = re.findall(r"^\.\. (?:autoclass|py:function|py:data):: ([\w.]+)", text, re.M)
        assert directives == [name for name, _ in names]


def test_the_catalogue_has_every_recipe(computed: ModuleType) -> None:
    text = computed.catalogue_page()
    for name in functional_sgd.catalogue.NAMES:
        assert f"| [`{name}`](#functional_sgd.{name}) |" in text


def test_docstrings_keep_their_code_and_examples(computed: ModuleType) -> None:
    text = "Take `a`s, and *b_.\n\n    c = a_ * b\n\n>>> 1 + 1\n2\n"
    lines = [line for line in computed.docstring_lines(text) if line]
    assert lines == [
        r"Take \ ``a``\ s, and \*b\_.",
        "::",
        "       c = a_ * b",
        ">>> 1 + 1",
        "2",
    ]


def test_every_optimizer_and_schedule_of_torch_is_in_the_table(names: ModuleType) -> None:
    theirs = {one for row in names.TORCH for one in row.split(", ")}
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    assert classes | names.schedulers_of_torch() <= theirs | {"LRScheduler"}


def test_every_name_of_optax_is_in_the_table(names: ModuleType) -> None:
    if importlib.util.find_spec("optax") is None:
        pytest.skip("optax is not installed")
    theirs = set()
    for row in names.OPTAX:
        first, *others = row.split(", ")
        prefix = "contrib." if first.startswith("contrib.") else ""
        theirs |= {first, *others, *(prefix + other for other in others)}
    known_losses = {f"{name}" for name in vars(importlib.import_module("optax.losses"))}
    assert names.public_names_of_optax() - theirs - known_losses == set()


def test_a_table_names_what_exists_and_says_where_there_is_none(names: ModuleType) -> None:
    assert names.here(("no_such_thing()", "sgd()  # the same")) == "`sgd()`: the same"
    assert names.here("no_such_thing()") == "none"
    assert names.here("a sentence about it") == "a sentence about it"


def test_no_name_of_ours_is_said_to_be_missing(names: ModuleType) -> None:
    """Where a row says none, there is nothing of that very name here."""
    for rows in names.TABLES.values():
        for theirs, row in rows.items():
            if names.here(row) == "none":
                words = {word.rpartition(".")[2] for word in theirs.split(", ")}
                assert not any(hasattr(functional_sgd, word) for word in words), theirs


def test_every_callback_of_fastai_is_on_its_page() -> None:
    listed = pytest.importorskip("tests.peers.test_fastai_catalogue")
    text = (DOCS / "coming_from" / "fastai.md").read_text()
    theirs = {*listed.SAME, *(name for names in listed.OTHERWISE for name in names.split())}
    assert {name for name in theirs if f"`{name}`" not in text} == set()


def test_the_picture_of_kernels_is_what_explain_says() -> None:
    spec = importlib.util.spec_from_file_location("pictures_of_docs", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pictures  # dataclasses look their module up
    spec.loader.exec_module(pictures)
    steps, moved = pictures.steps_of(
        functional_sgd.chain(functional_sgd.clip_norm, pictures.adamw())
    )
    assert [step.runner for step in steps] == ["kernel", "kernel"]
    assert steps[0].rules == "takes grad_norm"
    assert steps[1].columns.endswith("writes grad_avg, sqr_avg, param")
    assert "2 passes over memory" in moved
    assert pictures.kernels(pictures.CHAINS).axes


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    """All pages, all links between them; what is written as HTML is left out."""
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "dummy", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
