"""States in the format of torch.distributed.checkpoint, for tools that read that."""

import os
import warnings
from pathlib import Path

from loop.state import State


def export_dcp(state: State, folder: str | os.PathLike[str]) -> None:
    """Write params, buffers and the optimizer's state into a new folder, for
    `torch.distributed.checkpoint` (DCP): as `params.<name>`, `buffers.<name>` and
    `opt_state.<slot>.<name>`.

    Where there are several processes, call it on all of them: each writes its pieces. It is an
    export, not a checkpoint of a run: the history, what callbacks remember and the place in the
    data are not in it, and DCP's own index is a pickle. To go on, there are `Checkpoint` and
    `save`. Raises FileExistsError if there is something in the folder.

    >>> import torch
    >>> import torch.distributed.checkpoint as dcp
    >>> from tempfile import mkdtemp
    >>> from functional_sgd import momentum
    >>> from loop import Batches, DataLoaders, Learner
    >>> data = DataLoaders(Batches((torch.ones(2, 1), torch.ones(2, 1))))
    >>> learner = Learner(torch.nn.Linear(1, 1), data, torch.nn.functional.mse_loss, momentum())
    >>> folder = mkdtemp()
    >>> export_dcp(learner.init(seed=0), folder)
    >>> sorted(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    ['opt_state.grad_avg.bias', 'opt_state.grad_avg.weight', 'opt_state.step', 'params.bias', \
'params.weight']
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save

    place = Path(folder)
    if place.exists() and any(place.iterdir()):
        raise FileExistsError(f"export_dcp: there is something in {place}. Give a new folder.")
    document = {
        "params": dict(state.params),
        "buffers": dict(state.buffers),
        "opt_state": state.opt_state,
    }
    alone = not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save(document, checkpoint_id=place, no_dist=alone)
