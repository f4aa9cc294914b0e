"""What the fork server of `tests/started.py` imports before it forks, kept out of the way of the garbage collector."""

import gc

import pytest  # noqa: F401 - the main module, which multiprocessing imports in each process

import dinov2.cli
import dinov2.eval.linear3d
import dinov2.eval.segmentation3d
import dinov2.features.embed
import dinov2.train.train3d  # noqa: F401

gc.freeze()  # a process that looks at them copies them
