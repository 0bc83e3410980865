"""Searching a configuration's values: trials as cells of a sweep, proposed and pruned by Optuna, told honestly."""
