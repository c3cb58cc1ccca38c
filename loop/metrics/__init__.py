"""How good predictions are, in numbers: functions of a batch, and metrics that are exact over any
batches.
"""

from loop.metrics.confusion import CohenKappa as CohenKappa
from loop.metrics.confusion import ConfusionMatrix as ConfusionMatrix
from loop.metrics.confusion import Matthews as Matthews
from loop.metrics.confusion import confusion_matrix as confusion_matrix
from loop.metrics.functions import accuracy as accuracy
from loop.metrics.functions import accuracy_multi as accuracy_multi
from loop.metrics.functions import error_rate as error_rate
from loop.metrics.functions import mae as mae
from loop.metrics.functions import mse as mse
from loop.metrics.functions import msle as msle
from loop.metrics.functions import top_k_accuracy as top_k_accuracy
from loop.metrics.outside import TorchMetric as TorchMetric
from loop.metrics.overlap import F1 as F1
from loop.metrics.overlap import Dice as Dice
from loop.metrics.overlap import JaccardCoeff as JaccardCoeff
from loop.metrics.overlap import Precision as Precision
from loop.metrics.overlap import Recall as Recall
from loop.metrics.regression import R2 as R2
from loop.metrics.regression import RMSE as RMSE
from loop.metrics.regression import ExplainedVariance as ExplainedVariance
from loop.metrics.regression import Pearson as Pearson
from loop.metrics.regression import Perplexity as Perplexity
from loop.metrics.regression import Spearman as Spearman
from loop.metrics.table import Sums as Sums
from loop.metrics.table import add_batch as add_batch
from loop.metrics.table import means as means
from loop.metrics.table import metrics_by_name as metrics_by_name
from loop.metrics.table import sample_count as sample_count
from loop.metrics.tally import Accumulator as Accumulator
from loop.metrics.tally import Collected as Collected
from loop.metrics.tally import Mergeable as Mergeable
from loop.metrics.tally import Metric as Metric
from loop.metrics.tally import Tally as Tally
from loop.metrics.tally import Weighted as Weighted
from loop.metrics.tally import metric_name as metric_name

__all__ = [
    "F1",
    "R2",
    "RMSE",
    "Accumulator",
    "CohenKappa",
    "Collected",
    "ConfusionMatrix",
    "Dice",
    "ExplainedVariance",
    "JaccardCoeff",
    "Matthews",
    "Mergeable",
    "Metric",
    "Pearson",
    "Perplexity",
    "Precision",
    "Recall",
    "Spearman",
    "Sums",
    "Tally",
    "TorchMetric",
    "Weighted",
    "accuracy",
    "accuracy_multi",
    "add_batch",
    "confusion_matrix",
    "error_rate",
    "mae",
    "means",
    "metric_name",
    "metrics_by_name",
    "mse",
    "msle",
    "sample_count",
    "top_k_accuracy",
]
