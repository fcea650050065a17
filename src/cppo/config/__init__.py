"""What a run can be told: settings, their checks, recipes and `key=value`."""
