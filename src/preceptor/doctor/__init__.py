"""Checks before a run and after one, each a line: ok, warn or fail, a figure, and what to do."""
