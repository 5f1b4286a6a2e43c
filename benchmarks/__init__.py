"""Measurements of this library beside others: a package of its own because neither product imports it."""
