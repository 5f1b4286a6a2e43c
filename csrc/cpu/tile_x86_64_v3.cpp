// The kernels for x86-64-v3; empty where the compiler or the processor family has no such clone.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)  // REVQ_X86_CLONES of tile.h
#pragma GCC target("arch=x86-64-v3")
#include <immintrin.h>

#include "certificate.h"
#include "first_pass.h"
#include "tile.h"
#define REVQ_LANES 8

namespace revq::x86_64_v3 {
#include "tile.inl"
#include "simd.inl"
#include "score.inl"
#include "pack.inl"
#include "candidates.inl"
#include "rounded.inl"
}  // namespace revq::x86_64_v3
#endif
