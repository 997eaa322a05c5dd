"""Reporting through hooks: terminal progress, log, pictures and reports."""
