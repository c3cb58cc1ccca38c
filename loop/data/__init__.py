"""Where batches come from: in memory, from data sets with workers, padded, ahead of time."""

from loop.data.batches import Batches as Batches
from loop.data.batches import DataLoaders as DataLoaders
from loop.data.batches import class_count as class_count
from loop.data.batches import one_batch as one_batch
from loop.data.collate import padding_collate as padding_collate
from loop.data.loader import dataloaders as dataloaders
from loop.data.loader import make_loader as make_loader
from loop.data.prefetch import Prefetch as Prefetch

__all__ = [
    "Batches",
    "DataLoaders",
    "Prefetch",
    "class_count",
    "dataloaders",
    "make_loader",
    "one_batch",
    "padding_collate",
]
