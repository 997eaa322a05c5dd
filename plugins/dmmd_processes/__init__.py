"""Noise processes and schedules: masked and uniform; linear, cosine and polynomial."""
