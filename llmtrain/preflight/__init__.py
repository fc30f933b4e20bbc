"""Checks of hosts and ranks before a run: versions, GPUs, room, clocks, speed."""
