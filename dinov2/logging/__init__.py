"""Log format and the metric files of a run."""

from dinov2.logging.metric_logger import MetricLogger
from dinov2.logging.metrics import MetricWriter, read_metrics
from dinov2.logging.setup import Say, setup_logging

__all__ = ["MetricLogger", "MetricWriter", "Say", "read_metrics", "setup_logging"]
