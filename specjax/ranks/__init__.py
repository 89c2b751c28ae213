"""Rank tables: measured once, from which any tree's tokens per round follow without decoding again."""
