"""Rehearse one rank of a run of any size in one process: a real engine, tensors without values, no other
ranks."""
