// The walk for x86-64-v4; empty where the compiler or the processor family has no such clone.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)  // REVQ_X86_CLONES of tile.h
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own header (its bug 105593)
#include <immintrin.h>

#include "cpu/index/kernels.h"
#define REVQ_WALK_ISA 2

namespace revq::x86_64_v4 {
#include "cpu/index/lanes.inl"
#include "cpu/index/walk.inl"
#include "cpu/index/leaves.inl"
#include "cpu/index/hash.inl"
}  // namespace revq::x86_64_v4
#endif
