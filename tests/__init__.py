"""The tests; their processes collect garbage as seldom as the programs do (`dinov2/start.py`), from their first import on."""

import gc

from dinov2.start import THRESHOLDS

gc.set_threshold(*THRESHOLDS)
