"""Gradient leakage: attacks, defenses and theory, batched over victims."""
