// The search through an index: queries in blocks, one walk each, or a scan where the boxes cannot settle it.
#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/index/tree.h"
#include "core/parallel.h"

namespace revq {
namespace {

bool is_finite(const float* row, int64_t d) {
  float zero = 0.0f;
  for (int64_t j = 0; j < d; ++j) zero += row[j] * 0.0f;
  return zero == 0.0f;
}

}  // namespace

SearchVisits search_index(const GroupedRows& x, int64_t N, const Index& index, int64_t* indices) {
  const IndexLayout& layout = index.layout;
  const IndexKernels kernels = index_kernels(cpu_isa());
  // Small enough items that no thread waits long for the last one.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = (N * index.groups + 8 * threads - 1) / (8 * threads);
  const int64_t per_item = std::clamp<int64_t>(wanted, 1, kWalkers);
  const int64_t items = (N + per_item - 1) / per_item;
  std::atomic<int64_t> leaves{0}, blocks{0}, scanned{0};
  share_work(index.groups * items, [&](auto& next) {
    std::vector<float> queries(per_item * layout.d);
    std::vector<int64_t> rows(per_item);
    const auto space = std::make_unique<WalkSpace>();
    int64_t scans = 0;
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t g = item / items, first = item % items * per_item, end = std::min(first + per_item, N);
      const IndexGroup group = index.group(g);
      int64_t count = 0;
      for (int64_t row = first; row < end; ++row) {
        float* query = &queries[count * layout.d];
        x.read(row, g, query);
        rows[count] = row;
        if (index.finite[g] != 0 && is_finite(query, layout.d)) {
          ++count;
        } else {
          indices[row * index.groups + g] = kernels.scan(layout, group, query);
          ++scans;
        }
      }
      kernels.walk(layout, group, queries.data(), count, *space);
      for (int64_t q = 0; q < count; ++q) indices[rows[q] * index.groups + g] = space->chosen[q];
    }
    leaves += space->visited_leaves;
    blocks += space->visited_blocks;
    scanned += scans;
  });
  return {leaves, blocks, scanned};
}

}  // namespace revq
