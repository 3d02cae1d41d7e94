"""Loggers: metrics.csv, the console, Weights & Biases."""
