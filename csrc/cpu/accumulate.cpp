// Histogram of the chosen codes, and the gradient of the codebook.  A thread owns whole codes, so no two threads write
// one number, and each sum runs in query order whatever the number of threads.
#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "float_mode.h"
#include "search.h"

namespace revq {

void add_counts(const int64_t* indices, const Problem& problem, int64_t* count) {
  torch::stable::parallel_for(0, problem.G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t row = 0; row < problem.N; ++row) ++count[group * problem.K + indices[row * problem.G + group]];
    }
  });
}

void sum_segments(const GroupedRows& grad, const int64_t* indices, const Problem& problem, float* total) {
  const int64_t threads = torch::stable::get_num_threads();
  // Each slice of a group reads all of the group's indices: only as many slices as it takes to occupy the threads.
  const int64_t slices = std::min(problem.K, (threads + problem.G - 1) / problem.G);
  const int64_t codes = (problem.K + slices - 1) / slices;
  torch::stable::parallel_for(0, problem.G * slices, 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    std::vector<float> row(problem.d);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / slices, first = std::min(item % slices * codes, problem.K);
      const int64_t last = std::min(first + codes, problem.K);
      std::fill(total + (group * problem.K + first) * problem.d, total + (group * problem.K + last) * problem.d, 0.0f);
      for (int64_t n = 0; n < problem.N; ++n) {
        const int64_t code = indices[n * problem.G + group];
        if (code < first || code >= last) continue;
        grad.read(n, group, row.data());
        float* sum = total + (group * problem.K + code) * problem.d;
        for (int64_t j = 0; j < problem.d; ++j) sum[j] += row[j];
      }
    }
  });
}

}  // namespace revq
