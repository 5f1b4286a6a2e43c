"""Measurements against what a user would pick instead.  Nothing in the packages imports this."""
