"""Faults that are injected on purpose, one way into a step a file. They write no events: only detectors do."""
