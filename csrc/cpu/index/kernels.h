// The walk through one group's tree, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/index/layout.h"
#include "cpu/search/exact.h"

namespace revq {

// Queries that walk together: enough to hide a step's latency behind the steps of the others.
constexpr int64_t kWalkers = 32;
// Children that wait at one level before they are visited: bounds the workspace whatever the data.
constexpr int64_t kWaiting = 1024;

// Children that some of the walkers have yet to visit.
struct Waiting {
  int64_t size = 0;
  uint32_t entry[kWaiting + 16];  // walker << kChildBits | child; 16 more: they are written a register at a time
  float bound[kWaiting + 16];
};
constexpr int kChildBits = 27;  // 2^27 leaves hold 2^31 codes, and kWalkers takes the other 5
static_assert(kWalkers <= 1 << (32 - kChildBits) && kLeafCodes << kChildBits >= int64_t{1} << 31);

struct WalkSpace {
  Waiting blocks[kMaxLevels], leaves, near;
  float best[kWalkers];        // the smallest D so far
  int32_t chosen[kWalkers];    // and its code, the lowest of equals
  int32_t seed[kWalkers];      // the block of leaves that was visited first
  float passed[kMaxLevels][kWalkers][kFanout];  // the bounds on the way to it
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

// What may be said of a block of leaves.
constexpr uint32_t kWrongIds = 1, kNotFinite = 2, kChanged = 4;

// The codes into the leaves below one block of level 0; its boxes, and the box around them; corners is room for
// corner_floats(d) floats.  Returns kWrongIds, kNotFinite or 0.  stream: the leaves go past the caches.
using IndexFill = uint32_t (*)(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block,
                               float* corners, bool stream);
inline int64_t corner_floats(int64_t d) { return 32 * ((d + 3) / 4 * 4); }

// Whether the same leaves hold the same bits: kWrongIds, kChanged or 0.
using IndexCompare = uint32_t (*)(const float* codes, const IndexLayout& layout, const IndexGroup& group,
                                  int64_t block);

// kHashWords words, 4 kHashWords words of keys -> the digest, 4 numbers of 64 bits (index_hash.cpp).
constexpr int64_t kHashWords = 512;
using IndexHash = void (*)(const uint32_t* words, const uint32_t* keys, uint64_t* digest);

struct IndexKernels {
  IndexWalk walk = nullptr;
  IndexScan scan = nullptr;
  IndexBound bound = nullptr;
  IndexFill fill = nullptr;
  IndexCompare compare = nullptr;
  IndexHash hash = nullptr;
};

// The clone for an instruction set that the machine has (see cpu_isa); nulls when this build has none.
IndexKernels index_kernels(int isa);

#define REVQ_DECLARE_INDEX_KERNELS(isa)                                                                 \
  namespace isa {                                                                                       \
  void index_walk(const IndexLayout&, const IndexGroup&, const float*, int64_t, WalkSpace&);            \
  int32_t index_scan(const IndexLayout&, const IndexGroup&, const float*);                              \
  void index_bound(const IndexLayout&, const IndexGroup&, const float*, int, int64_t, float*);          \
  uint32_t index_fill(const float*, const IndexLayout&, const IndexGroup&, int64_t, float*, bool);      \
  uint32_t index_compare(const float*, const IndexLayout&, const IndexGroup&, int64_t);                 \
  void index_hash(const uint32_t*, const uint32_t*, uint64_t*);                                         \
  }
REVQ_DECLARE_INDEX_KERNELS(baseline)
REVQ_DECLARE_INDEX_KERNELS(x86_64_v3)
REVQ_DECLARE_INDEX_KERNELS(x86_64_v4)
#undef REVQ_DECLARE_INDEX_KERNELS

}  // namespace revq
