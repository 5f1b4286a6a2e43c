// The kernels for any processor: SSE2 on x86-64, NEON on arm64, else plain vector extensions.
#include <utility>

#include "cpu/kernels.h"
#include "cpu/search/certificate.h"

#define REVQ_ISA baseline
#define REVQ_LANES 4
#define REVQ_INT16 0

#include "cpu/clones/clone.inl"
