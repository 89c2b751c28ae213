"""Measuring and drawing what drafters and trees do."""
