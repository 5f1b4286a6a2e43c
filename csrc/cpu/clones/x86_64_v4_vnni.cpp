// What VNNI adds to x86-64-v4: the first pass in int16.  The other kernels are those of x86-64-v4.
#include <utility>

#include "cpu/kernels.h"
#include "cpu/search/certificate.h"

#if REVQ_X86_CLONES
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,avx512vnni")
// gcc 12 warns of its own header, where an undefined lane is a variable initialized with itself (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define REVQ_ISA x86_64_v4_vnni
#define REVQ_LANES 16
#define REVQ_INT16 1

#include "core/simd.h"
#include "cpu/search/score.inl"
#include "cpu/search/int16.inl"

namespace revq::REVQ_ISA {
extern const Int16Kernels int16_kernels = {round_codes, round_queries, score<Int16>};
}  // namespace revq::REVQ_ISA

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
