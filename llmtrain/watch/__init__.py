"""Detect hangs, mismatched collectives and slow ranks while a run goes on, and name the rank."""
