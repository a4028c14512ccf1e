"""What is learned after training from images alone: INT8 ranges, temperatures, exit thresholds."""
