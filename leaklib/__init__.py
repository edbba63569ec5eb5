"""Gradient leakage: attacks, defenses and metrics, batched over victims."""
