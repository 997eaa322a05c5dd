"""Objectives: denoising for teachers, moment matching (D-MMD) for students."""
