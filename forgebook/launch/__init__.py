"""Ray: train workers, jobs, sweeps."""
