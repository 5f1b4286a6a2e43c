"""Benchmarks against other libraries: a package of its own because neither revq nor revq_kernels imports it."""
