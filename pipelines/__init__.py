"""One training run from text to result: corpus, data, the Ray Train job, checkpoints and MLflow tracking."""
