// The rounded first pass for x86-64-v4 with VNNI; empty where the compiler or the processor family has no such clone.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)  // REVQ_X86_CLONES of tile.h
#pragma GCC target("arch=x86-64-v4,avx512vnni")
// gcc 12 warns of its own header: an undefined lane is a variable initialized with itself there.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/search/certificate.h"
#include "cpu/search/kernels.h"
#define REVQ_LANES 16

namespace revq::x86_64_v4_vnni {
#include "core/simd.inl"
#include "cpu/search/scores.inl"
#include "cpu/search/int16.inl"
}  // namespace revq::x86_64_v4_vnni
#endif
