"""What most processes of tests import: the server that they are forked from does it for them."""

import contextlib
import gc
import importlib
import os

import torch

for name in "torch.distributed.tensor matplotlib.pyplot functional_sgd loop".split():
    importlib.import_module(name)
for name in "sklearn.datasets torchvision tyro rich.console".split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

gc.freeze()  # a collection in a fork need not look at, and so copy, what is here

# torch renews its pool of threads when a forked process first asks for it, and ends the process
# ("Invalid thread pool!") if two threads, say gloo's and autograd's, ask for it at once. So let the
# only thread that there is at the start ask first.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
