"""A name of 3DINO's; what segmentations are scored by is in `dinov2.eval.metrics.segmentation`."""

from dinov2.errors import replaced

get_metric = replaced(
    "dinov2.eval.segmentation_3d.metrics.get_metric", "dinov2.eval.metrics.segmentation.score_case and summarise"
)
