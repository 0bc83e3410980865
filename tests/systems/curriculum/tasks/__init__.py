"""Tests of RL on tasks."""
