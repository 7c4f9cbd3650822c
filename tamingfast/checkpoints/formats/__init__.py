"""Families of checkpoints that are not in the original's layout: one file each."""
