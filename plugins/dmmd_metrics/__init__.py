"""Metrics: exact distances where the truth is known, feature distances, diversity and copying elsewhere."""
