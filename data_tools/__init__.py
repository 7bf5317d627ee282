"""Slides, tissue, tiles, phantoms, the on-disk formats, and the deterministic tile stream."""
