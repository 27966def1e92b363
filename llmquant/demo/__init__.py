"""The built-in model with its calibration text and its held-out text: data files only."""

from pathlib import Path

DEMO = Path(__file__).parent
