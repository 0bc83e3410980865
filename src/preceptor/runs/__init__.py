"""The run folder: everything a run leaves on disk, and everything it needs to go on after a stop.

``folder`` is the door: ``create_run`` and ``open_run`` return a ``Run``, the one object that a system's ``train`` is
given.
"""
