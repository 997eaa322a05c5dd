"""Data: real 8x8 digits, and distributions small enough to enumerate."""
