"""Loggers: metrics.csv, the console, TensorBoard, Weights & Biases."""
