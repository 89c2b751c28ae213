"""Fitting Medusa heads: self-distilled text, features, losses, the trainer."""
