"""Moments of training for tests of techniques."""

from moe.schedule import Moment

START = Moment(step=0, steps=100, lr=1e-3, global_batch_size=8, sequence_length=16)
