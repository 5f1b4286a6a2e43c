"""Quantizer modules."""
