// Histogram of the indices, and the gradient of the codebook.  No two threads write one element of an output.  Each sum
// of the gradient runs in query order, and counts are integers, so no result depends on the number of threads.
#include "cpu/accumulate.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "core/float_mode.h"

namespace revq {
namespace {

// Counting may split the rows of a group into pieces.  Each piece fills a private histogram [K], which one thread then
// adds to the result.  A piece needs enough rows to pay for clearing and adding its histogram: at least
// kMinRowsPerPiece, and at least kRowsPerElement * K.
constexpr int64_t kMinRowsPerPiece = int64_t{1} << 16, kRowsPerElement = 4;
// Number of rows that balanced_cuts samples: enough to find the codes that have many rows.
constexpr int64_t kSampledRows = 4096;
// Block size of sum_rows.  It first lists the rows of a block that it must add, then adds them.  The list stays in the
// first-level cache.
constexpr int64_t kRowsAhead = 512;

// The number of pieces per group with which the pieces of all groups together occupy all threads.
int64_t pieces_wanted(const Problem& problem) {
  return divide_up(static_cast<int64_t>(torch::stable::get_num_threads()), problem.G);
}

// Counts the indices of the rows [first, last) of a group.
void count_rows(const int64_t* indices, const Problem& problem, int64_t group, int64_t first, int64_t last,
                int64_t* histogram) {
  for (int64_t n = first; n < last; ++n) ++histogram[indices[n * problem.G + group]];
}

// Cuts the codes of a group into `pieces` ranges of about equal work, by a sample of the rows.  Work is a row to add or a
// code to clear.  Only speed depends on it.
std::vector<int64_t> balanced_cuts(const int64_t* indices, const Problem& problem, int64_t group, int64_t pieces) {
  const int64_t step = std::max<int64_t>(1, problem.N / kSampledRows);
  std::vector<int64_t> cuts{0}, work(problem.K, 1);
  for (int64_t n = 0; n < problem.N; n += step) work[indices[n * problem.G + group]] += step;
  int64_t whole = 0, done = 0;
  for (const int64_t w : work) whole += w;
  for (int64_t code = 0; code < problem.K; ++code) {
    done += work[code];
    while (static_cast<int64_t>(cuts.size()) < pieces && done * pieces >= static_cast<int64_t>(cuts.size()) * whole) {
      cuts.push_back(code + 1);
    }
  }
  cuts.push_back(problem.K);
  return cuts;
}

// Adds the rows of a group whose index (a code) is in [first, last) to the sums of their codes, in query order.
void sum_rows(const GroupedRows& grad, const int64_t* indices, const Problem& problem, int64_t group, int64_t first,
              int64_t last, float* row, float* sums) {
  int64_t rows[kRowsAhead];
  for (int64_t begin = 0; begin < problem.N; begin += kRowsAhead) {
    int64_t found = 0;
    for (int64_t n = begin; n < std::min(begin + kRowsAhead, problem.N); ++n) {
      const int64_t code = indices[n * problem.G + group];
      rows[found] = n;  // always written: a branch on the index would be unpredictable
      found += code >= first && code < last;
    }
    for (int64_t i = 0; i < found; ++i) {
      grad.read(rows[i], group, row);
      float* sum = sums + indices[rows[i] * problem.G + group] * problem.d;
      for (int64_t j = 0; j < problem.d; ++j) sum[j] += row[j];
    }
  }
}

}  // namespace

void add_counts(const int64_t* indices, const Problem& problem, int64_t* count) {
  const int64_t pieces =
      std::min(pieces_wanted(problem), problem.N / std::max(kMinRowsPerPiece, kRowsPerElement * problem.K));
  if (pieces <= 1) {
    torch::stable::parallel_for(0, problem.G, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        count_rows(indices, problem, group, 0, problem.N, count + group * problem.K);
      }
    });
    return;
  }
  std::vector<int64_t> histograms(problem.G * pieces * problem.K);
  torch::stable::parallel_for(0, problem.G * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t piece = item % pieces;
      count_rows(indices, problem, item / pieces, problem.N * piece / pieces, problem.N * (piece + 1) / pieces,
                 histograms.data() + item * problem.K);
    }
  });
  for (int64_t item = 0; item < problem.G * pieces; ++item) {
    for (int64_t k = 0; k < problem.K; ++k) count[item / pieces * problem.K + k] += histograms[item * problem.K + k];
  }
}

void sum_segments(const GroupedRows& grad, const int64_t* indices, const Problem& problem, float* total) {
  // Each piece reads all indices of its group, so more pieces than threads would only add reading.
  const int64_t pieces = std::min(problem.K, pieces_wanted(problem));
  std::vector<std::vector<int64_t>> cuts(pieces > 1 ? problem.G : 0);
  for (size_t group = 0; group < cuts.size(); ++group) cuts[group] = balanced_cuts(indices, problem, group, pieces);
  torch::stable::parallel_for(0, problem.G * pieces, 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    std::vector<float> row(problem.d);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / pieces, piece = item % pieces;
      const int64_t first = pieces > 1 ? cuts[group][piece] : 0, last = pieces > 1 ? cuts[group][piece + 1] : problem.K;
      float* sums = total + group * problem.K * problem.d;
      std::fill(sums + first * problem.d, sums + last * problem.d, 0.0f);
      sum_rows(grad, indices, problem, group, first, last, row.data(), sums);
    }
  });
}

}  // namespace revq
