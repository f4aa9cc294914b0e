"""Work on data as SLURM jobs."""
