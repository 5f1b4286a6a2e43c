// The kernels for x86-64-v4; empty where the compiler or the processor family has no such clone.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)  // REVQ_X86_CLONES of tile.h
#pragma GCC target("arch=x86-64-v4")
// gcc 12 warns of its own header: an undefined lane is a variable initialized with itself there.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/search/certificate.h"
#include "cpu/search/kernels.h"
#include "cpu/search/exact.h"
#define REVQ_LANES 16

namespace revq::x86_64_v4 {
#include "cpu/search/exact.inl"
#include "core/simd.inl"
#include "cpu/search/scores.inl"
#include "cpu/search/pack.inl"
#include "cpu/search/candidates.inl"
}  // namespace revq::x86_64_v4
#endif
