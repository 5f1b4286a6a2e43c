// The kernels for x86-64-v4 (AVX-512).
#include <utility>

#include "cpu/kernels.h"
#include "cpu/search/certificate.h"

#if REVQ_X86_CLONES
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
// gcc 12 warns of its own header, where an undefined lane is a variable initialized with itself (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define REVQ_ISA x86_64_v4
#define REVQ_LANES 16
#define REVQ_INT16 0

#include "cpu/clones/clone.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
