// The trees of a codebook: build, refit and search.  Their arrays are tensors that Python owns (revq_kernels/index.py).
#pragma once

#include <vector>

#include "core/tensors.h"
#include "cpu/kernels.h"

namespace revq {

// The trees of all groups of a codebook.
struct Tree {
  TreeLayout layout;
  int64_t groups;
  float* panels;
  int32_t* ids;
  float* boxes;
  int32_t* finite;  // [G]: 0 where a group holds a code that is not finite, which no box bounds

  TreeGroup group(int64_t g) const {
    return {panels + g * layout.leaves * layout.panel_floats(), ids + g * layout.leaves * kLeafCodes,
            boxes + g * layout.blocks * layout.block_floats()};
  }
};

// Orders the codes of a contiguous float32 codebook [G, K, d] into leaves: writes ids.
void order_codes(const float* codebook, const Tree& tree);

// Copies the codes into the panels, in the order of ids, and takes their boxes: writes panels, boxes and finite.
// Returns false, and leaves some leaves as they were, where an id is not a code's.
bool fill_tree(const float* codebook, const Tree& tree);

// Writes the contract's index of every query into indices [N, G].  Returns what the walks did; `scanned` counts queries
// that were compared with all codes.  Of arrays that `fill_tree` did not write (NaN boxes, foreign ids, ...) it reads
// nothing outside, but `strays` counts the queries that got no code: an index not in [0, codes).
struct SearchVisits {
  int64_t leaves = 0, blocks = 0, scanned = 0, strays = 0;
};
SearchVisits search_tree(const GroupedRows& x, int64_t N, const Tree& tree, int64_t* indices);

}  // namespace revq
