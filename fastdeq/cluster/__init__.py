"""The jobs of a sweep in Slurm's queue: submitted, looked at, cancelled, collected."""
