"""Stain in optical density: estimation, per-slide fits, normalization and augmentation, batched on any device."""
