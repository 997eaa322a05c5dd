"""Samplers: exact ancestral sampling, sampling by confidence for masks, and block after block by either."""
