"""Samplers: exact ancestral sampling, and sampling by confidence for masks."""
