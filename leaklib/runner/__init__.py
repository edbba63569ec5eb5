"""Runner: one notebook with parameters, or a grid of them, through papermill."""

from leaklib.runner.profiles import choose_plan

__all__ = ["choose_plan"]
