"""What most processes of tests import: the server that they are forked from does it for them."""

import contextlib
import gc
import importlib

for name in "torch torch.distributed.tensor matplotlib.pyplot functional_sgd loop".split():
    importlib.import_module(name)
for name in "sklearn.datasets torchvision tyro rich.console".split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

gc.freeze()  # a collection in a fork need not look at, and so copy, what is here
