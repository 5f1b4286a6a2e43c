// How a tree lies in memory: one per group, of which only the leaves hold codes.
//
// A leaf is kLeafCodes codes, transposed into one panel.  A block is the boxes of up to kFanout children, also
// transposed, so that one pass of SIMD bounds them all.  Block b of level 0 bounds leaves 16 b ... 16 b + 15; block b of
// level l + 1 bounds blocks 16 b ... 16 b + 15 of level l; the last level has one block, the root.  Splits are placed so
// that every aligned run of 2^n leaves is a subtree of the kd tree (build.cpp), and only the last leaf may be partly
// full: nothing but the order of the codes has to be stored.
#pragma once

#include <cstdint>

#include "core/sizes.h"

namespace revq {

constexpr int64_t kLeafCodes = 16;
constexpr int64_t kFanout = 16;
constexpr int kMaxLevels = 8;  // 16^8 leaves are more than 2^31 codes

struct TreeLayout {
  int64_t codes, d, leaves;
  int levels;
  int64_t children[kMaxLevels];     // boxes of a level
  int64_t first_block[kMaxLevels];  // where the blocks of a level start
  int64_t blocks;                   // of all levels

  TreeLayout(int64_t num_codes, int64_t code_dim)
      : codes(num_codes), d(code_dim), leaves(divide_up(num_codes, kLeafCodes)), levels(0), blocks(0) {
    int64_t count = leaves;
    do {
      children[levels] = count;
      first_block[levels] = blocks;
      count = divide_up(count, kFanout);
      blocks += count;
      ++levels;
    } while (count > 1);
  }

  int64_t panel_floats() const { return d * kLeafCodes; }
  int64_t block_floats() const { return 2 * d * kFanout; }
};

// The arrays of one group.
struct TreeGroup {
  float* panels;  // [leaves, d, kLeafCodes]
  int32_t* ids;   // [leaves, kLeafCodes]: the indices of the codes; lanes past the last code repeat it
  float* boxes;   // [blocks, 2, d, kFanout]: lower and upper corners; children past the last are all zeros
};

}  // namespace revq
