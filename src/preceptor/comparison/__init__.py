"""Comparing runs: sweeps of seeds × inputs as processes, and one comparison over many finished runs."""
