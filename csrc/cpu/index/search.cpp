// Searches a tree: a walk per block of queries, and a scan of all leaves for queries that boxes cannot settle.
#include <algorithm>
#include <atomic>
#include <memory>

#include "core/parallel.h"
#include "cpu/index/tree.h"

namespace revq {
namespace {

bool is_finite(const float* row, int64_t d) {
  float zero = 0.0f;
  for (int64_t j = 0; j < d; ++j) zero += row[j] * 0.0f;
  return zero == 0.0f;
}

}  // namespace

SearchVisits search_tree(const GroupedRows& x, int64_t N, const Tree& tree, int64_t* indices) {
  const TreeLayout& layout = tree.layout;
  const TreeKernels& clone = *kernels(cpu_isa()).tree;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = divide_up(N * tree.groups, kSearchItemsPerThread * threads);
  const int64_t per_item = std::clamp<int64_t>(wanted, 1, kWalkers);
  const int64_t items = divide_up(N, per_item);
  std::atomic<int64_t> leaves{0}, blocks{0}, scanned{0}, strays{0};
  share_work(tree.groups * items, [&](auto& next) {
    std::vector<float> queries(per_item * layout.d);
    std::vector<int64_t> rows(per_item);
    const auto space = std::make_unique<WalkSpace>();
    int64_t scans = 0, wrong = 0;
    const auto put = [&](int64_t row, int64_t g, int32_t index) {
      indices[row * tree.groups + g] = index;
      wrong += index < 0 || index >= layout.codes;
    };
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t g = item / items, first = item % items * per_item, end = std::min(first + per_item, N);
      const TreeGroup group = tree.group(g);
      int64_t count = 0;
      for (int64_t row = first; row < end; ++row) {
        float* query = &queries[count * layout.d];
        x.read(row, g, query);
        rows[count] = row;
        if (tree.finite[g] != 0 && is_finite(query, layout.d)) {
          ++count;
        } else {
          put(row, g, clone.scan(layout, group, query));
          ++scans;
        }
      }
      clone.walk(layout, group, queries.data(), count, *space);
      for (int64_t q = 0; q < count; ++q) put(rows[q], g, space->index[q]);
    }
    leaves += space->visited_leaves;
    blocks += space->visited_blocks;
    scanned += scans;
    strays += wrong;
  });
  return {leaves, blocks, scanned, strays};
}

}  // namespace revq
