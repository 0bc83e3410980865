"""The forward pass without gradient, compiled for this machine's processor."""
