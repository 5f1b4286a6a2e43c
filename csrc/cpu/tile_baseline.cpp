// The kernels for any processor.
#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "certificate.h"
#include "first_pass.h"
#include "tile.h"
#define REVQ_LANES 4

namespace revq::baseline {
#include "tile.inl"
#include "simd.inl"
#include "score.inl"
#include "pack.inl"
#include "candidates.inl"
}  // namespace revq::baseline
