"""Drafters: what fills the tree. One file each."""
