"""Hangs, wrong collectives and slow ranks: found while a run goes on, and named."""
