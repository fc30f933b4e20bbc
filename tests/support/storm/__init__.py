"""A storm of faults over a training job on two hosts: see tests/faults/chaos.py."""
