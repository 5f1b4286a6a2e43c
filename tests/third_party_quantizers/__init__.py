"""Quantizers of repositories that are no packages: what each computes, in our own code, as the thing to compare with."""
