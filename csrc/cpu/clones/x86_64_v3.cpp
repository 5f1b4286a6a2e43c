// The kernels for x86-64-v3 (AVX2 and FMA).  Headers come before the target: their inline functions are shared with
// units for other processors.
#include <utility>

#include "cpu/kernels.h"
#include "cpu/search/certificate.h"

#if REVQ_X86_CLONES
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif

#define REVQ_ISA x86_64_v3
#define REVQ_LANES 8
#define REVQ_INT16 1

#include "cpu/clones/clone.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
