"""The sweeps: Ray Tune searches over the training runs of the wing below, `pipelines`."""
