"""Run every example in its short form, and write a page with what they print and draw."""

import html
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from fashion_data import CACHE, FILES, found

HERE, DATA, EMPTY = Path(__file__).parent, "{data}", "{empty}"
RUNS: dict[str, Sequence[str]] = {
    "digits": ("--epochs", "5"),
    "pictures": ("--epochs", "1"),
    "momentum": (),
    "spreadsheet": ("--epochs", "60"),
    "annealers": ("--lrs", "0.1", "--epochs", "10", "--seeds", "1"),
    "lr_finder": (),
    "init": (),
    "forgetting_eval": (),
    "fashion_mnist": ("--short", "--root", f"{DATA}/fashion_mnist"),
    "imagenette": ("--short", "--root", f"{DATA}/imagenette2_128sq"),
    "rnn": ("--short",),
    "gpt": ("--short", "--folder", f"{EMPTY}/gpt"),
    "maml": ("--outer-steps", "200"),
    "ensemble": ("--epochs", "4"),
    "gan": ("--epochs", "20"),
    "optimizers": ("--epochs", "2", "--scales", "1.0"),
    "learn_the_lr": ("--outer-steps", "20"),
    "new_optimizer": (),
    "new_callback": (),
    "lesson9_data": (),
    "lesson9_model": ("--seeds", "2"),
    "resume": ("--epochs", "2", "--folder", f"{EMPTY}/resume"),
    "ranks": (),
    "shards": ("--epochs", "1", "--folder", f"{EMPTY}/shards"),
}
"""Example -> its arguments; {data} is where data sets are, {empty} a folder that is removed."""

ON_RANKS = ("ranks", "shards")  # torchrun starts them, as two processes
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Result:
    """How a run went: its exit status, None if its data are not there."""

    name: str
    status: int | None
    printed: str
    seconds: float


def run(name: str, data: Path, empty: str) -> Result:
    """Run an example on one core."""
    arguments = [part.format(data=data.resolve(), empty=empty) for part in RUNS[name]]
    root = Path(arguments[arguments.index("--root") + 1]) if "--root" in arguments else HERE
    if name == "fashion_mnist" and not all(found(root, file) for file in FILES):
        root = CACHE
        arguments[arguments.index("--root") + 1] = str(CACHE)
    if not root.is_dir():
        return Result(name, None, f"skipped: there are no data in {root}", 0.0)
    launcher, started = TORCHRUN if name in ON_RANKS else (), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / f"{name}.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds, said = time.perf_counter() - started, "FAILED" if done.returncode else "done"
    print(f"{name}: {said} in {seconds:.0f} s", flush=True)
    return Result(name, done.returncode, done.stdout, seconds)


def section(result: Result, folder: Path) -> str:
    """What the page says of an example."""
    source = (HERE / f"{result.name}.py").read_text()
    about = source.split('"""')[1]
    images = [Path(path) for path in re.findall(r"saved (\S+\.png)", result.printed)]
    shown = (f'<img src="{path.name}">' for path in images if (folder / path.name).exists())
    return (
        f"<h2>{result.name}.py {html.escape(' '.join(RUNS[result.name]))}</h2>"
        f"<p>{html.escape(about)}</p>{''.join(shown)}"
        f"<details><summary>printed, in {result.seconds:.0f} s</summary>"
        f"<pre>{html.escape(result.printed)}</pre></details>"
    )


def main(data: Path = Path("data"), only: tuple[str, ...] = (), at_once: int = 2) -> None:
    """Run the examples, write pictures/index.html, and end with status 1 if one has failed.

    Args:
        data: The folder with fashion_mnist and imagenette2_128sq; what needs others is left out.
        only: These examples, not all.
        at_once: How many run at a time.
    """
    (folder := Path("pictures")).mkdir(exist_ok=True)
    with TemporaryDirectory() as empty, ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda name: run(name, data, empty), only or RUNS))
    style = "body{font-family:sans-serif;max-width:60em;margin:auto}img{max-width:100%}"
    head = f"<!doctype html><meta charset=utf-8><title>Examples</title><style>{style}</style>"
    body = "".join(section(result, folder) for result in results)
    (folder / "index.html").write_text(f"{head}<h1>Examples</h1>{body}")
    print(f"saved {folder}/index.html")
    failed = ", ".join(result.name for result in results if result.status not in (0, None))
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    tyro.cli(main)
