"""Stability techniques: one technique a file."""
