"""Observers that a recipe switches on: TensorBoard, Weights & Biases."""
