"""Planted faults that the tests must catch."""
