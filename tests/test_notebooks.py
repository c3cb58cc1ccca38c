"""The notebooks run in a kernel, and show pictures and tables where a reader expects them."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "notebooks"

SHOWN = {
    "first_steps": [
        ("data", "table"),
        ("data.train", "table"),
        ("learner", "table"),
        ("start", "table"),
        ("summary", "table"),
        ("found", "picture"),
        ("end = fit_one_cycle", "table picture"),  # Progress and ShowGraph, whatever the epochs
        ("end", "table"),
        ("end.history", "table"),
        ("plot_schedules", "picture"),
        ("validate", "text"),
        ("plot_predictions", "picture"),
        ("plot_confusion_matrix", "picture"),
        ("plot_losses", "table picture"),
    ],
    "callbacks": [
        ("learner", "table"),
        ("show_loop", "text"),
        ("end = fit", "table"),
        ("plot_activations", "picture"),
        ("plot_activation_histograms", "picture"),
        ("plot_records", "picture"),
        ("ablate", "table"),
    ],
    "optimizers": [
        ("adam.describe", "table"),
        ('new_params["w"]', "text"),
        ("fuse", "table"),
        ("lion.describe", "table"),
        ("ends[name] = fit", "table table"),
        ('ends["lion"].history', "table"),
        ("plot_losses", "picture"),
        ("plot_schedule", "picture"),
    ],
}
"""What the last line of a cell begins with, and what the cell shows; those that show nothing are
not listed.
"""


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook with its outputs, from a fresh kernel, with nothing of this user's."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel sets its own
    notebook = nbformat.read(path, as_version=4)
    places = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=places)
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return notebook


def kind_of(output: Any) -> str:
    """What a reader sees: of all forms of an output, the richest is shown."""
    data = output.get("data", {})
    if "image/png" in data:
        return "picture"
    if "text/html" in data:
        return "table" if "<table>" in data["text/html"] else "html"
    return "text"


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_notebook_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = executed(FOLDER / f"{name}.ipynb", tmp_path, monkeypatch).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    seen = [cell for cell in code if cell.outputs]
    lines = [cell.source.splitlines()[-1].strip() for cell in seen]
    assert [" ".join(map(kind_of, cell.outputs)) for cell in seen] == [k for _, k in SHOWN[name]]
    assert all(map(str.startswith, lines, [begins for begins, _ in SHOWN[name]]))
    for output in (output for cell in code for output in cell.outputs):
        check(output)


def check(output: Any) -> None:
    """Nothing that a reader would not want to see: warnings, addresses, raw tensors, blank
    pictures.
    """
    assert output.get("name") != "stderr", output
    data = output.get("data", {})
    text = output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")
    assert "tensor(" not in text
    assert " object at 0x" not in text
    if kind_of(output) == "picture":
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L")
        assert picture.getextrema() != (255, 255)
        assert output.metadata["image/png"]["width"] * 2 == pytest.approx(picture.width, abs=2)
    else:
        assert "Figure" not in text
    if kind_of(output) == "table":
        assert "<progress" not in text  # no bar is left when a run is over


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert path.stem in SHOWN
    assert path.stat().st_size < 20_000
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert not any(line.startswith(("%", "!")) for cell in cells for line in cell["source"])
