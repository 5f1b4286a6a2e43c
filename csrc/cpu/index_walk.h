// The walk through one group's tree, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "index_layout.h"
#include "tile.h"

namespace revq {

// Queries that walk together: enough to hide a step's latency behind the steps of the others.
constexpr int64_t kWalkers = 32;
// Children that wait at one level before they are visited: bounds the workspace whatever the data.
constexpr int64_t kWaiting = 512;

// Children that some of the walkers have yet to visit, as (walker, child, bound).
struct Waiting {
  int64_t size = 0;
  int32_t walker[kWaiting + 16], child[kWaiting + 16];  // 16 more: they are written a register at a time
  float bound[kWaiting + 16];
};

struct WalkSpace {
  Waiting blocks[kMaxLevels], leaves, near;
  float best[kWalkers];        // the smallest D so far
  int32_t chosen[kWalkers];    // and its code, the lowest of equals
  int32_t seed[kWalkers];      // the block of leaves that was visited first
  int64_t visited_leaves = 0, visited_blocks = 0;
};

// queries [count <= kWalkers, d], finite, on a group of finite codes -> the contract's index of each in space.chosen.
using IndexWalk = void (*)(const IndexLayout& layout, const IndexGroup& group, const float* queries, int64_t count,
                           WalkSpace& space);

// The same for one query, any, on any codes, by D over all leaves; returns the index.
using IndexScan = int32_t (*)(const IndexLayout& layout, const IndexGroup& group, const float* query);

// The bounds of the children of one block, for the test that attacks them.
using IndexBound = void (*)(const IndexLayout& layout, const IndexGroup& group, const float* query, int level,
                            int64_t block, float* bounds);

struct IndexKernels {
  IndexWalk walk;
  IndexScan scan;
  IndexBound bound;
};

// The clone for an instruction set that the machine has (see cpu_isa); nulls when this build has none.
IndexKernels index_kernels(int isa);

#define REVQ_DECLARE_INDEX_KERNELS(isa)                                                         \
  namespace isa {                                                                               \
  void index_walk(const IndexLayout&, const IndexGroup&, const float*, int64_t, WalkSpace&);    \
  int32_t index_scan(const IndexLayout&, const IndexGroup&, const float*);                      \
  void index_bound(const IndexLayout&, const IndexGroup&, const float*, int, int64_t, float*);  \
  }
REVQ_DECLARE_INDEX_KERNELS(baseline)
REVQ_DECLARE_INDEX_KERNELS(x86_64_v3)
REVQ_DECLARE_INDEX_KERNELS(x86_64_v4)
#undef REVQ_DECLARE_INDEX_KERNELS

}  // namespace revq
