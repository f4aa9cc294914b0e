"""Folders to a datalist: walk -> examine (headers, voxels, metadata) -> judge -> list and quarantine; one file per arrow."""
