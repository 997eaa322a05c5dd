"""Backbones: a diffusion transformer for one and two dimensions, and a small network for exact worlds."""
