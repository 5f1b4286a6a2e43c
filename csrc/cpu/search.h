// The brute-force search of all groups, and what follows it in the same pass.
#pragma once

#include "core/tensors.h"

namespace revq {

// Writes the contract's index of every query into indices [N, G].  Unless quantized is null, also writes the rows of the
// codebook at these indices, converted to `type`, into quantized [N, G, d]; unless count is null, also adds to count
// [G, K] how often each code was found.  Results depend on no thread count and no block size.
void search(const GroupedRows& x, const Codebook& codebook, const Problem& problem, int64_t* indices, void* quantized,
            ScalarType type, int64_t* count);

}  // namespace revq
