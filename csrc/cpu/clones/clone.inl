// All kernels of one instruction set, and their tables.  The unit that includes this file defines REVQ_ISA, REVQ_LANES
// and REVQ_INT16, and has selected the target; README.md lists what each file holds.
#include "core/simd.h"
// In the order of their use of each other.
#include "cpu/search/exact.inl"
#include "cpu/search/score.inl"
#include "cpu/search/pack.inl"
#include "cpu/search/candidates.inl"
#include "cpu/index/walk.inl"
#include "cpu/index/leaves.inl"
#if REVQ_INT16
#include "cpu/search/int16.inl"
#endif

namespace revq::REVQ_ISA {

extern const SearchKernels search_kernels = {kLanes,         exact,    pack_exact, pack_codes,     pack_queries,
                                             score<Float32>, smallest, at_most,    nearest_of_each};
extern const TreeKernels tree_kernels = {walk, scan, bound, fill};
#if REVQ_INT16
extern const Int16Kernels int16_kernels = {round_codes, round_queries, score<Int16>};
#endif

}  // namespace revq::REVQ_ISA
