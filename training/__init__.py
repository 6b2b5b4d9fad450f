"""Training: optimizer, schedule, distributed processes, checkpoint files, the run's folder, metrics, loggers."""
