"""Names of 3DINO's MONAI pipelines, which are recipes and plain functions here."""

from dinov2.errors import replaced

CropForegroundSwapSliceDims = replaced(
    "dinov2.data.CropForegroundSwapSliceDims", "dinov2.data.preprocess.preprocess(voxels, spacing_mm, name)"
)
make_classification_transform_3d = replaced(
    "dinov2.data.transforms.make_classification_transform_3d",
    "a recipe (configs/eval/datasets) with dinov2.data.downstream.cases.Cases and crops.training_cube or central_cube",
)
