// The codebook index: build, refit, compare and search.  Its arrays are tensors that Python owns (revq_kernels/index.py).
#pragma once

#include <vector>

#include "core/tensors.h"
#include "cpu/index/layout.h"
#include "cpu/index/kernels.h"

namespace revq {

// The index of all groups of a codebook.
struct Index {
  IndexLayout layout;
  int64_t groups;
  float* panels;
  int32_t* ids;
  float* boxes;
  int32_t* finite;  // [G]: 0 where a group holds a code that is not finite, and so has no boxes to go by

  IndexGroup group(int64_t g) const {
    return {panels + g * layout.leaves * layout.panel_floats(), ids + g * layout.leaves * kLeafCodes,
            boxes + g * layout.blocks * layout.block_floats()};
  }
};

// Orders the codes of a contiguous float32 codebook [G, K, d] into leaves: writes ids.
void order_codes(const float* codebook, const Index& index);

// Copies the codes into the panels, in the order of ids, and takes their boxes: writes panels, boxes and finite.
// False, and some leaves stay as they were, where an id is no code's.
bool fill_index(const float* codebook, const Index& index);

// Whether a codebook holds the index's codes, bit for bit: 0, kChanged or kWrongIds.
uint32_t compare_index(const float* codebook, const Index& index);

// The digests of a contiguous float32 codebook of `count` numbers, int64 [digest_rows(count), 4] (index_hash.cpp).
int64_t digest_rows(int64_t count);
void hash_codebook(const float* codebook, int64_t count, int64_t* digests);

// The contract's index of every query, into indices [N, G]; returns what the walks did, with `scanned` the queries that
// went to all codes.
struct SearchVisits {
  int64_t leaves = 0, blocks = 0, scanned = 0;
};
SearchVisits search_index(const GroupedRows& x, int64_t N, const Index& index, int64_t* indices);

}  // namespace revq
