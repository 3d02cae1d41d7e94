"""The jobs of a sweep in Slurm's queue: submit, inspect, cancel, collect."""
