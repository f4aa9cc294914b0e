"""Figures, a file a family: arrays and rows in, PNG (and PDF and CSV) out; what a number means, whoever has it says."""

from dinov2.visual.figures.style import STYLE as STYLE
from dinov2.visual.figures.style import save as save
from dinov2.visual.figures.training import draw_bars as draw_bars
