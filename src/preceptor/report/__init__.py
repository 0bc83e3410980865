"""What a run shows: terminal tables, SVG charts and a self-contained page, all made from the run folder alone."""
