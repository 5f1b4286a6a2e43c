// The walk for any processor, and the choice of a clone.
#include "cpu/index/kernels.h"
#define REVQ_WALK_ISA 0

namespace revq::baseline {
#include "cpu/index/lanes.inl"
#include "cpu/index/walk.inl"
#include "cpu/index/leaves.inl"
#include "cpu/index/hash.inl"
}  // namespace revq::baseline

namespace revq {

#define REVQ_INDEX_KERNELS(isa) \
  {isa::index_walk, isa::index_scan, isa::index_bound, isa::index_fill, isa::index_compare, isa::index_hash}

IndexKernels index_kernels(int isa) {
  if (isa == 0) return REVQ_INDEX_KERNELS(baseline);
#if REVQ_X86_CLONES
  if (isa == 1) return REVQ_INDEX_KERNELS(x86_64_v3);
  if (isa == 2 || isa == 3) return REVQ_INDEX_KERNELS(x86_64_v4);
#endif
  return {};
}

}  // namespace revq
