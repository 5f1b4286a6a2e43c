// What one instruction set's clone offers to the tree: a table of functions on the arrays of one group.
#pragma once

#include <cstdint>

#include "cpu/index/layout.h"
#include "cpu/index/tuning.h"

namespace revq {

// Children that some of the walking queries have yet to visit.
struct PendingList {
  int64_t size = 0;
  uint32_t entry[kMaxPending + 16];  // query << kChildBits | child; 16 more, because registers are written whole
  float bound[kMaxPending + 16];
};
constexpr int kChildBits = 27;  // 2^27 leaves hold 2^31 codes, and the number of a query takes the other 5 bits
static_assert(kWalkers <= 1 << (32 - kChildBits) && kLeafCodes << kChildBits >= int64_t{1} << 31);

// The workspace of one walk of up to kWalkers queries.
struct WalkSpace {
  PendingList blocks[kMaxLevels], leaves, near;
  float best[kWalkers];                         // the smallest exact distance so far
  int32_t index[kWalkers];                      // its code, the lowest among equals
  int32_t seed[kWalkers];                       // the block of leaves that was visited first
  float passed[kMaxLevels][kWalkers][kFanout];  // the bounds on the way to that block
  int64_t visited_leaves = 0, visited_blocks = 0;
};

// May be or-ed.  What `fill` found in a block of leaves.
constexpr uint32_t kWrongIds = 1, kNotFinite = 2;

struct TreeKernels {
  // queries [count <= kWalkers, d], finite, on a group of finite codes -> the contract's index of each in space.index.
  void (*walk)(const TreeLayout& layout, const TreeGroup& group, const float* queries, int64_t count, WalkSpace& space);
  // The same for one query, finite or not, on any codes, by exact distances of all leaves; returns the index.
  int32_t (*scan)(const TreeLayout& layout, const TreeGroup& group, const float* query);
  // The bounds of the children of one block, for the test that attacks them.
  void (*bound)(const TreeLayout& layout, const TreeGroup& group, const float* query, int level, int64_t block,
                float* bounds);
  // Copies codes into the leaves below one block of level 0; also writes its boxes, and the box around them.  `corners`
  // is workspace of corner_floats(d) floats.  Returns kWrongIds, kNotFinite or 0.  past_caches: how leaves are stored.
  uint32_t (*fill)(const float* codes, const TreeLayout& layout, const TreeGroup& group, int64_t block, float* corners,
                   bool past_caches);
};

constexpr int64_t corner_floats(int64_t d) { return 32 * ((d + 3) / 4 * 4); }

}  // namespace revq
