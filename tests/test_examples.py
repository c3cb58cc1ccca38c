"""Every example runs, in short form, as its reader would run it."""

import ast
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import forking, python

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(
    path.name for path in (ROOT / "examples").glob("*.py") if "def main" in path.read_text()
)


def run(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints; warnings are errors there too."""
    done = python("-W", "error", ROOT / "examples" / name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_picture(folder: Path, name: str) -> bool:
    """Whether it was saved."""
    return (folder / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_digits_reaches_97_percent_and_saves_three_pictures(tmp_path: Path) -> None:
    """R2: images, a convolutional network, a chain as its optimizer, the loop, metrics."""
    printed = run("digits.py", cwd=tmp_path)
    last = re.fullmatch(r"accuracy (0\.\d{3}) in \d+ s", printed.strip().splitlines()[-1])
    assert last is not None
    assert float(last[1]) >= 0.97
    saved = re.findall(r"saved (.*\.png)", printed)
    assert len(saved) == 3
    assert all((tmp_path / path).read_bytes().startswith(b"\x89PNG") for path in saved)


def test_new_optimizer(tmp_path: Path) -> None:
    printed = run("new_optimizer.py", "--steps", "20", cwd=tmp_path)
    assert "rename(average_grad" in printed
    assert len(re.findall(r"loss 0\.\d+ after 20 steps", printed)) == 3


def test_new_callback(tmp_path: Path) -> None:
    printed = run("new_callback.py", "--target", "10", cwd=tmp_path)
    assert (
        "after_epoch: recorder, stop_when_good, progress" in printed
        or "stopped after epoch 0, 12 noisy" in printed
    )
    assert "stopped after epoch 0, 12 noisy steps" in printed


def test_fashion_mnist_on_made_up_images(tmp_path: Path) -> None:
    for name, count in (("train", 2048), ("t10k", 1024)):
        images = bytes(i % 251 for i in range(count * 28 * 28))
        header = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + images)
        labels = bytes(i % 10 for i in range(count))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">HBBI", 0, 8, 1, count) + labels
        )
    printed = run(
        "fashion_mnist.py",
        "--root",
        str(tmp_path),
        "--short",
        "--rows",
        "one_cycle_torch",
        cwd=tmp_path,
    )
    assert "0.822" in printed  # the lesson's first epoch, beside ours
    assert is_picture(tmp_path, "fashion_mnist")


def test_lesson9_data(tmp_path: Path) -> None:
    printed = run("lesson9_data.py", cwd=tmp_path)
    assert "batches of 3 out of ten: [3, 3, 3, 1]" in printed
    assert re.findall(r"the same: (\w+)|tail of epoch 3: (\w+)", printed) == [("True", "")] * 3 + [
        ("", "True")
    ]
    assert (
        "loss over batches of 4 and 1: 3.00; the mean of the batches' means would be 5.25"
        in printed
    )


def test_n13_n17_n18_lesson9_model(tmp_path: Path) -> None:
    """By hand and by the loop it is the same; accuracies vary from run to run, and all are above
    0.7.
    """
    printed = run("lesson9_model.py", "--seeds", "3", "--epochs", "2", cwd=tmp_path)
    assert "by hand and by the loop, the same weights: True" in printed
    assert printed.count(": 4 parameters") == 4
    last = re.search(r"accuracy of 3 runs: (0\.\d+) \+- (0\.\d+), (0\.\d+) to (0\.\d+)", printed)
    assert last is not None
    mean, spread, low, high = map(float, last.groups())
    assert 0.7 < low < mean < high < 0.99
    assert 0 < spread < 0.1


def test_r1_b2_b12_b13_n44_pictures(tmp_path: Path) -> None:
    """What adapts the rate of each parameter is ahead, as in the book; four pictures are saved."""
    printed = run("pictures.py", "--epochs", "2", cwd=tmp_path)
    rows = re.findall(r"(\S.*): 0\.\d{3}  (0\.\d{3})", printed)
    last = {name.strip(): float(value) for name, value in rows}
    assert min(last["Adam"], last["RMSProp"]) > max(last["momentum"], last["plain SGD"]) > 0.5
    for name in ("optimizers", "momentum", "betas", "loop"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_l19_annealers_are_compared_with_schedules(tmp_path: Path) -> None:
    """From an lr that is too high, lowering it by what the gradients say ends at a smaller loss
    than leaving it.
    """
    printed = run("annealers.py", "--lrs", "0.1", "--epochs", "10", "--seeds", "1", cwd=tmp_path)
    losses = dict(re.findall(r"0\.1\s+│ (\S.*\S)\s+│ [\d.]+\s+│ ([\d.]+)\s+│", printed))
    assert len(losses) == 6
    assert float(losses["anneal on rise above 1.2"]) < float(losses["constant"])
    assert (tmp_path / "pictures" / "annealers_0.1.png").read_bytes().startswith(b"\x89PNG")


def test_l7_l10_l12_l13_l17_spreadsheet(tmp_path: Path) -> None:
    """Every cell of the workbook's first seven epochs, and the annealer's first cut."""
    printed = run("spreadsheet.py", "--epochs", "7", cwd=tmp_path)
    number = r"│ +(\d+\.\d+) +"
    cells = re.findall(rf"│ \S.* │ [157] +{number * 4}│", printed)
    assert len(cells) == 11
    assert all(there == ours and a == b for there, ours, a, b in cells)
    assert re.search(r"in \[7\] here", printed)
    assert is_picture(tmp_path, "spreadsheet")


def test_q8_b12_momentum(tmp_path: Path) -> None:
    """It is through the canyon first, and over the bump."""
    printed = run("momentum.py", cwd=tmp_path)
    steps = [int(found) for found in re.findall(r"after (\d+) steps", printed)]
    assert steps[1] < steps[0] / 2
    ends = [float(found) for found in re.findall(r"ends at (\S+)", printed)]
    assert ends[0] < -1 < 1.9 < ends[1]
    assert all(is_picture(tmp_path, f"momentum_{name}") for name in ("parabola", "canyon", "bump"))


def test_lr_finder(tmp_path: Path) -> None:
    printed = run("lr_finder.py", "--epochs", "1", cwd=tmp_path)
    assert len(re.findall(r"│ (\S.*\S) +│ \S+ +│ \d\.\d+ +│ 0\.\d+ +│", printed)) == 5
    assert is_picture(tmp_path, "lr_finder")


def test_n1_n4_n6_init(tmp_path: Path) -> None:
    """torch's weights let a tenth through, or less, of what kaiming's do."""
    printed = run("init.py", "--layers", "3", "--epochs", "1", cwd=tmp_path)
    assert "0.5774 at 2.23607" in printed
    four = [float(found) for found in re.findall(r"│ (\S+) +│ 0\.(?:0065|404)", printed)]
    assert 0 < 10 * four[0] < four[1]
    assert is_picture(tmp_path, "init")


def test_n25_forgetting_eval(tmp_path: Path) -> None:
    """With eval() the batch size has no say; without it, it has."""
    printed = run("forgetting_eval.py", "--epochs", "1", "--sizes", "2", "8", "360", cwd=tmp_path)
    rows = re.findall(r"│ \d+ +│ (0\.\d+) +│ (0\.\d+) +│ (0\.\d+) +│", printed)
    right, forgotten, _ = (set(column) for column in zip(*rows, strict=True))
    assert (len(rows), len(right)) == (3, 1)
    assert len(forgotten) > 1


def test_rnn(tmp_path: Path) -> None:
    arguments = ("--length", "20000", "--epochs", "1", "--width", "8")
    printed = run("rnn.py", *arguments, cwd=tmp_path)
    assert len(re.findall(r"│ RNNRegularizer.* │ \d\.\d+ +│ 0\.\d+ +│", printed)) == 2
    assert is_picture(tmp_path, "rnn")


def test_gpt_goes_on_where_it_was(tmp_path: Path) -> None:
    """A run that is complete is not begun again: no sample, and the same loss."""
    tiny = "--length 3000 --epochs 1 --window 16 --width 16 --layers 1 --accumulate 2".split()
    first, again = (run("gpt.py", *tiny, cwd=tmp_path) for _ in range(2))
    assert ("---" in first, "---" in again) == (True, False)
    losses = [re.findall(r"parameters, \d+ steps, loss (\S+)", text) for text in (first, again)]
    assert losses[0] == losses[1] != []
    assert "in a plain loop" in first


def test_imagenette_on_made_up_images(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for label in ("n01", "n02"):
            folder = tmp_path / "imagenette2-160" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                color = (index * 40, 200 if label == "n01" else 20, 90)
                Image.new("RGB", (40 + index, 36), color).save(folder / f"{index}.png")
    tiny = "--size 32 --epochs 1 --arch resnet18 --batch-size 4 --rows adam".split()
    printed = run("imagenette.py", "--root", str(tmp_path), *tiny, cwd=tmp_path)
    assert re.search(r"│ adam +│ 0\.323  0\.437  0\.595 +│ [01]\.\d+ +│", printed)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("maml", "--outer-steps 2 --task-count 2", "new tasks from learned weights"),
        ("ensemble", "--members 3 --epochs 1", "3 members"),
        ("learn_the_lr", "--outer-steps 1 --inner-steps 2", "learned, in 1 runs"),
        ("optimizers", "--names adamw prodigy --epochs 1 --scales 1.0", "prodigy"),
    ],
)
def test_functional_training(name: str, arguments: str, says: str, tmp_path: Path) -> None:
    assert says in run(f"{name}.py", *arguments.split(), cwd=tmp_path)
    assert is_picture(tmp_path, name)


def test_gan_reaches_every_place_of_the_ring(tmp_path: Path) -> None:
    printed = run("gan.py", "--epochs", "10", cwd=tmp_path)
    found = re.search(r"(\d+)% are good, at (\d) of 8 places", printed)
    assert found is not None
    assert (int(found[1]) > 40, found[2]) == (True, "8")
    assert is_picture(tmp_path, "gan")
    assert is_picture(tmp_path, "gan_losses")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def by_torchrun(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints that torchrun starts on two ranks."""
    command = [sys.executable, *TORCHRUN, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_two_ranks(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints on two ranks that find in their environment what torchrun puts there,
    but need not import torch.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def one(rank: int) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = "2"
        return python(ROOT / "examples" / name, *arguments, cwd=cwd, env=env)

    forking()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(one, range(2)))
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    return "".join(done.stdout for done in both)


def test_ranks_end_where_one_process_ends(tmp_path: Path) -> None:
    printed = by_torchrun("ranks.py", "--epochs", "1", cwd=tmp_path)
    found = re.search(r"one process ends (\d+e[+-]\d+) away", printed)
    assert found is not None
    assert float(found[1]) < 1e-8


def test_shards_hold_a_share_each_and_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    short = ("--epochs", "1", "--characters", "6000")
    for _ in range(2):
        printed = on_two_ranks("shards.py", *short, cwd=tmp_path)
        assert "the ranks hold [58240, 58240]" in printed
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_gallery_runs_every_example(tmp_path: Path) -> None:
    """All are in its list; one is run here. What has no data is left out, and said so."""
    printed = run("gallery.py", "--only", "lesson9_data", "imagenette", cwd=tmp_path)
    assert "lesson9_data: done" in printed
    page = (tmp_path / "pictures" / "index.html").read_text()
    assert "batches of 3 out of ten" in page
    assert "skipped: there are no data" in page
    listed = re.findall(r'^    "(\w+)": \(', (ROOT / "examples" / "gallery.py").read_text(), re.M)
    assert sorted(f"{name}.py" for name in (*listed, "gallery")) == EXAMPLES


def test_resume_ends_the_same_after_a_kill_and_a_ctrl_c(tmp_path: Path) -> None:
    expected = run("resume.py", "--epochs", "2", "--folder", "whole", cwd=tmp_path).splitlines()[-1]
    assert re.fullmatch(r"accuracy 0\.\d{3}, digest [0-9a-f]{16}", expected)
    command = [
        sys.executable,
        "-W",
        "error",
        str(ROOT / "examples" / "resume.py"),
        "--epochs",
        "2",
        "--folder",
        "parts",
    ]
    killed = subprocess.run(
        [*command, "--kill-at", "15"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (killed.returncode, killed.stdout.splitlines()[-1]) == (
        -signal.SIGKILL,
        "killed in batch 15",
    )
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "goes on after batch 10\n"
        stopped.send_signal(signal.SIGINT)
        assert re.search(r"SIGINT after batch \d+: give the same command", stopped.stdout.read())
    assert stopped.returncode == 0
    assert run("resume.py", *command[4:], cwd=tmp_path).splitlines()[-1] == expected
    assert (tmp_path / "parts" / "table.csv").read_text() == (
        tmp_path / "whole" / "table.csv"
    ).read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_fits_on_two_screens(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) < 120


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_trained_has_a_device_and_a_seed(name: str) -> None:
    """Two train nothing: the gallery, and the one about data."""
    parsed = ast.parse((ROOT / "examples" / name).read_text())
    main = next(one for one in parsed.body if getattr(one, "name", "") == "main")
    assert isinstance(main, ast.FunctionDef)
    options = {one.arg for one in main.args.args}
    missing = {"device", "seed"} - options
    assert missing == {"gallery.py": {"device", "seed"}, "lesson9_data.py": {"device"}}.get(
        name, set()
    )


HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], path.rpartition("/")[0]
    try:
        runpy.run_path(path, run_name="__main__")
        raise RuntimeError(f"{path} takes no --help")
    except SystemExit:
        print("described", path.rpartition("/")[2])
"""


def test_each_says_how_to_use_it(tmp_path: Path) -> None:
    """All in one process: most of the time of one is torch's."""
    paths = [str(ROOT / "examples" / name) for name in EXAMPLES]
    done = python("-c", HELP, *paths, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("described")] == [
        f"described {name}" for name in EXAMPLES
    ]
    assert sum(line.startswith("usage") for line in lines) == len(EXAMPLES)
