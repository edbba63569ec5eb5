"""Sweeps: a function of one setting mapped over many, resumable, local or on a cluster."""

from leaklib.sweep.mapping import SweepResult, grid, read_sweep, setting_key, sweep, sweep_manifest

__all__ = ["SweepResult", "grid", "read_sweep", "setting_key", "sweep", "sweep_manifest"]
