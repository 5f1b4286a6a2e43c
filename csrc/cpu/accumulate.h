// What accumulates over the queries of each code: counts and sums.  Results depend on no thread count.
#pragma once

#include "core/tensors.h"

namespace revq {

// Adds to count [G, K] how often each code occurs in indices [N, G].
void add_counts(const int64_t* indices, const Problem& problem, int64_t* count);

// Sums the rows of grad with the same index, in query order, in float32, into total [G, K, d].
void sum_segments(const GroupedRows& grad, const int64_t* indices, const Problem& problem, float* total);

}  // namespace revq
