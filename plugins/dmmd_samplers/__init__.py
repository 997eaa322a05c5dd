"""Samplers: exact ancestral sampling."""
