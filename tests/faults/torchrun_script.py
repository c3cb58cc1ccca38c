"""A run that torchrun starts again: `torchrun ... -m tests.faults.torchrun_script FOLDER KIND RANK
BATCH EVENT`. That rank is killed in that batch, the first time; what became of the second time is
written into FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from loop import load_latest
from loop.disk.store import checkpoints
from tests.faults.groups import be_strict
from tests.faults.rank_script import Send, train
from tests.loop.saving import identical

if __name__ == "__main__":
    be_strict()
    folder, kind, victim, batch, event = Path(sys.argv[1]), *sys.argv[2:]
    dist.init_process_group("gloo")
    rank, again = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    begun = load_latest(folder / "run").train_iter if checkpoints(folder / "run") else 0
    kill = [Send(int(batch), event)] if rank == int(victim) and not again else []
    end = train(kind, folder / "run", kill)
    facts = {"again": again, "begun": begun, "same": identical(end, train(kind, None))}
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()
