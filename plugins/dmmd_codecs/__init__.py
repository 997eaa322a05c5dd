"""Codecs: plain integers, pixel levels, and k-means patches."""
