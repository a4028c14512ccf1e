"""Train an `MGENet`: losses, schedules, thresholds, the loop and what it writes."""
