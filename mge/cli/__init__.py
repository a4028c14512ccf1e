"""The commands that need torch: mge-train and mge-eval."""
