"""Files of any format to raw voxels with their place in the world."""
