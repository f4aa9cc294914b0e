"""A name of 3DINO's MONAI pipelines, which are recipes here."""

from dinov2.errors import replaced

make_transforms = replaced(
    "dinov2.eval.segmentation_3d.augmentations.make_transforms",
    "a recipe (configs/eval/datasets) with dinov2.data.downstream.cases.Cases and crops.training_crops",
)
