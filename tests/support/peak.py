"""Lets runs of this process, and of those forked from it, measure its peak for a fiftieth of a second: else a
training of a few steps would take a fifth of its time for that."""

from llmtrain.track import peak

peak.MEASURING_SECONDS = 0.02
