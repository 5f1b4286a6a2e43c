// Fused grouped nearest-code search, and what follows it in the same pass.
#pragma once

#include "core/tensors.h"

namespace revq {

// The contract's index of every query, into indices [N, G]; and, unless quantized is null, the chosen rows of the
// codebook, converted to `type`, into quantized [N, G, d]; and, unless count is null, adds to count [G, K] how often
// each code was chosen.  Results depend on no thread count and no block size.
void search(const GroupedRows& x, const Codebook& codebook, const Problem& problem, int64_t* indices, void* quantized,
            ScalarType type, int64_t* count);

// Adds to count [G, K] how often each code stands in indices [N, G].
void add_counts(const int64_t* indices, const Problem& problem, int64_t* count);

// Sums the rows of grad that chose the same code, in query order, in float32, into total [G, K, d].
void sum_segments(const GroupedRows& grad, const int64_t* indices, const Problem& problem, float* total);

}  // namespace revq
