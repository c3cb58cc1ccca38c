"""One run on several processes: each has a part of every batch, and all have the same state."""

from loop.ranks.batch_norm import global_batch_norm as global_batch_norm
from loop.ranks.exporting import export_dcp as export_dcp
from loop.ranks.gathering import gathering as gathering
from loop.ranks.parallel import parallel as parallel
from loop.ranks.sharding import shard as shard
from loop.ranks.sharding import unshard as unshard

__all__ = ["export_dcp", "gathering", "global_batch_norm", "parallel", "shard", "unshard"]
