"""The families of quantizers; empty, so that importing one family loads no other (`revq_kernels.interop.registry` lists them)."""
