"""What a notebook is shown in place of text; tests/test_notebooks.py runs real ones."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from functional_sgd import adam, centralize, chain, clip_norm, fuse, sgd
from functional_sgd.notebook import html_facts, html_table, notebook, show

Bundle = dict[str, str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Bundle]:
    """What is shown in a notebook that stands in for IPython's."""
    found: list[Bundle] = []
    fake: Any = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel="a kernel"),
        display=lambda bundle, raw: found.append(bundle),
    )
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    return found


def cells(html: str) -> list[list[str]]:
    """The text of every row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_a_table_has_titles_and_rows() -> None:
    html = html_table([("a", "1"), ("b", "2")], ("name", "size"))
    assert cells(html) == [["name", "size"], ["a", "1"], ["b", "2"]]
    assert html.count("<th ") == 2


def test_text_is_never_markup() -> None:
    html = html_table([("<script>", "a & b")], ("<b>",), caption="<i>")
    assert cells(html) == [["&lt;b&gt;"], ["&lt;script&gt;", "a &amp; b"]]
    assert "<i>" not in html


def test_columns_after_the_first_ones_are_flush_right() -> None:
    html = html_table([("a", "1", "2")], left=1)
    assert re.findall(r"text-align: (\w+)", html) == ["left", "right", "right"]


@pytest.mark.parametrize("count", [60, 61, 1000])
def test_a_long_table_shows_its_first_and_last_rows(count: int) -> None:
    rows = cells(html_table([(str(index),) for index in range(count)]))
    if count == 60:
        assert len(rows) == 60
    else:
        assert rows[4:7] == [["4"], [f"… {count - 60} rows …"], [str(count - 55)]]
        assert rows[-1] == [str(count - 1)]
        assert len(rows) == 61


def test_nothing_is_an_empty_table() -> None:
    assert cells(html_table([])) == []
    assert cells(html_facts({})) == []


def test_a_terminal_gets_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert notebook() is None
    show("text", "<p>html</p>")
    assert capsys.readouterr().out == "text\n"


def test_ipython_on_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = SimpleNamespace(get_ipython=lambda: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert notebook() is None
    fake.get_ipython = lambda: None  # imported, but not running
    assert notebook() is None


def test_a_notebook_gets_both(shown: list[Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    show("text", "<p>html</p>")
    assert shown == [{"text/plain": "text", "text/html": "<p>html</p>"}]
    assert capsys.readouterr().out == ""


def test_describe_has_the_same_cells_in_both(shown: list[Bundle]) -> None:
    adam().describe()
    (bundle,) = shown
    rows = cells(bundle["text/html"])
    assert rows[0] == ["rule", "scope", "reads", "hypers", "writes", "keeps"]
    text = [" ".join(line.split()) for line in bundle["text/plain"].splitlines()]
    assert text == [" ".join(" ".join(row).split()) for row in rows]


def test_explain_shows_the_steps_and_what_is_moved(shown: list[Bundle]) -> None:
    opt = fuse(chain(centralize, clip_norm, sgd(lr=0.1)))
    opt.explain({"w": torch.zeros(2, 2)})
    (bundle,) = shown
    assert [row[0] for row in cells(bundle["text/html"])] == [
        "executor",
        *(line.split()[0] for line in bundle["text/plain"].splitlines()[:3]),
    ]
    (below,) = re.findall("<p>(.*?)</p>", bundle["text/html"])
    assert below == bundle["text/plain"].splitlines()[-1]


def test_explain_without_kernels_is_a_line(shown: list[Bundle]) -> None:
    fuse(sgd(lr=0.1)).explain({"w": torch.zeros(2, dtype=torch.complex64)})
    (bundle,) = shown
    assert bundle["text/html"] == f"<p>{bundle['text/plain']}</p>"
