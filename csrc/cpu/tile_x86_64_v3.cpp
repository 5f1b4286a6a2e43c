// The tile for x86-64-v3; empty where the compiler or the processor family has no such clone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("arch=x86-64-v3")
#include "tile.h"

namespace revq::x86_64_v3 {
#include "tile.inl"
}  // namespace revq::x86_64_v3
#endif
