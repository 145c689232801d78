"""Commands: argument parsing and nothing else."""
