// The sizes of a problem, and division that rounds up.  No torch here: the kernels and csrc/dev use it.
#pragma once

#include <cstdint>

namespace revq {

// N queries per group, G groups, K codes per codebook, d elements per code.
struct Problem {
  int64_t N, G, K, d;
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace revq
