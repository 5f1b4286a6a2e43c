// The walk for any processor, and the choice of a clone.
#include "index_walk.h"
#define REVQ_WALK_ISA 0

namespace revq::baseline {
#include "index_lanes.inl"
#include "index_walk.inl"
}  // namespace revq::baseline

namespace revq {

IndexKernels index_kernels(int isa) {
  if (isa == 0) return {baseline::index_walk, baseline::index_scan, baseline::index_bound};
#if REVQ_X86_CLONES
  if (isa == 1) return {x86_64_v3::index_walk, x86_64_v3::index_scan, x86_64_v3::index_bound};
  if (isa == 2) return {x86_64_v4::index_walk, x86_64_v4::index_scan, x86_64_v4::index_bound};
#endif
  return {nullptr, nullptr, nullptr};
}

}  // namespace revq
