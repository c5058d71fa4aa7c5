"""What everything stands on: configuration, artifacts, progress, errors."""
