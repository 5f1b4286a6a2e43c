// The kernels for any processor.
#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/search/certificate.h"
#include "cpu/search/kernels.h"
#include "cpu/search/exact.h"
#define REVQ_LANES 4

namespace revq::baseline {
#include "cpu/search/exact.inl"
#include "core/simd.inl"
#include "cpu/search/scores.inl"
#include "cpu/search/pack.inl"
#include "cpu/search/candidates.inl"
}  // namespace revq::baseline
