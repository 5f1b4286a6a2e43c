// The search: D of the contract over all codes, a tile of packed codes at a time.  Nothing here is a first pass: the
// direct form needs no bound, and its result is the contract's by construction.
#include "search.h"

#include <algorithm>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "float_mode.h"
#include "tile.h"

namespace revq {
namespace {

// A block of queries shares one packing of the codes: 256 make packing a few per cent of the arithmetic.
constexpr int64_t kQueriesPerBlock = 256;
// A tile of codes stays in the first-level cache beside a step's queries.
constexpr int64_t kTileBytes = 16 * 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t panels_per_tile(int64_t d) {
  return std::max<int64_t>(1, kTileBytes / static_cast<int64_t>(sizeof(float) * kLanes * d));
}

// Panels of codes [first, first + kLanes * num_panels); lanes past the last code repeat it, and so never win: their
// distance is not smaller and their number is higher.
void pack(const Codebook& codebook, int64_t group, int64_t first, int64_t num_panels, const Problem& problem,
          float* row, float* panels) {
  for (int64_t i = 0; i < num_panels * kLanes; ++i) {
    if (first + i < problem.K) codebook.read(group, first + i, row);
    float* panel = panels + (i / kLanes) * problem.d * kLanes + i % kLanes;
    for (int64_t j = 0; j < problem.d; ++j) panel[j * kLanes] = row[j];
  }
}

// The lowest key over the lanes, where a lane's code is its panel * kLanes + lane.
int64_t winner(const Best& best) {
  int32_t key = best.key[0];
  int64_t code = int64_t{best.panel[0]} * kLanes;
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    const int64_t candidate = int64_t{best.panel[lane]} * kLanes + lane;
    if (best.key[lane] < key || (best.key[lane] == key && candidate < code)) {
      key = best.key[lane];
      code = candidate;
    }
  }
  return code;
}

struct Workspace {
  std::vector<float> queries, panels, row;
  std::vector<Best> best;
};

void search_block(const GroupedRows& x, const Codebook& codebook, const Problem& problem, int64_t group,
                  int64_t first_query, int64_t num_queries, SearchTile tile, Workspace& work, int64_t* indices) {
  const int64_t padded = divide_up(num_queries, kQueriesPerStep) * kQueriesPerStep;
  for (int64_t q = 0; q < padded; ++q) {
    x.read(first_query + std::min(q, num_queries - 1), group, &work.queries[q * problem.d]);
    std::fill_n(work.best[q].key, kLanes, std::numeric_limits<int32_t>::max());
    std::fill_n(work.best[q].panel, kLanes, 0);
  }
  const int64_t all_panels = divide_up(problem.K, kLanes), step = panels_per_tile(problem.d);
  for (int64_t panel = 0; panel < all_panels; panel += step) {
    const int64_t num_panels = std::min(step, all_panels - panel);
    pack(codebook, group, panel * kLanes, num_panels, problem, work.row.data(), work.panels.data());
    tile(work.queries.data(), padded, problem.d, work.panels.data(), num_panels, static_cast<int32_t>(panel),
         work.best.data());
  }
  for (int64_t q = 0; q < num_queries; ++q) indices[(first_query + q) * problem.G + group] = winner(work.best[q]);
}

}  // namespace

void search(const GroupedRows& x, const Codebook& codebook, const Problem& problem, int64_t* indices, void* quantized,
            ScalarType type) {
  if (problem.N == 0) return;
  const SearchTile tile = search_tile(cpu_isa());
  // With few groups the blocks shrink until every thread has one.
  const int64_t blocks_wanted = divide_up(static_cast<int64_t>(torch::stable::get_num_threads()), problem.G);
  const int64_t per_block = std::min(kQueriesPerBlock, divide_up(problem.N, blocks_wanted));
  const int64_t blocks = divide_up(problem.N, per_block);
  torch::stable::parallel_for(0, problem.G * blocks, 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    Workspace work;
    work.queries.resize((per_block + kQueriesPerStep) * problem.d);
    work.panels.resize(panels_per_tile(problem.d) * kLanes * problem.d);
    work.row.resize(problem.d);
    work.best.resize(per_block + kQueriesPerStep);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / blocks, first = item % blocks * per_block;
      const int64_t count = std::min(per_block, problem.N - first);
      search_block(x, codebook, problem, group, first, count, tile, work, indices);
      if (quantized == nullptr) continue;
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t place = row * problem.G + group;
        codebook.read(group, indices[place], work.row.data());
        store(type, quantized, place * problem.d, problem.d, work.row.data());
      }
    }
  });
}

}  // namespace revq
