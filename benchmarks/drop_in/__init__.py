"""Other people's quantizers, as they come and patched: time, memory, wrong codes."""
