// The sizes of a search, in one place: which form, how many queries and codes at a time.  None changes a result.
#include <algorithm>

#include "cpu/search/block.h"

namespace revq {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first pass pays when a query's share of it outweighs its candidates' D, and a code's that of packing it.  D over
// all codes costs as d does, and two more numbers for the key.
constexpr int64_t kMinCodes = 48, kMinNumbers = 3072, kNumbersPerKey = 2;
constexpr int64_t kMinQueries = 12;
// A block of queries shares one packing of the codes: 512 make packing a few per cent of the arithmetic.
constexpr int64_t kQueriesPerBlock = 512;
// A cell is as many codes as make its D cheap beside the scores of all codes, and beside the minima of all cells.
constexpr int64_t kNumbersPerCell = 512, kMaxCell = 32, kCodesPerSquare = 16;
// The minima of a run, and its packed codes, stay in the second-level cache.
constexpr int64_t kMinimaFloats = 3 * (int64_t{1} << 14), kPanelFloats = int64_t{1} << 18;

// The queries of a block stand in memory up to three times, and take at most half of it.
constexpr int64_t kShareOfQueries = 6;

// Beyond this a tile's packed codes leave the second-level cache.
constexpr int64_t kMaxFirstPassDim = 4096;
static_assert(kMaxFirstPassDim <= kMaxCertifiedDim);

// The same for all blocks, and whole packs.
int64_t queries_per_block(int64_t N, int64_t d, int64_t most_floats) {
  const int64_t most = std::clamp<int64_t>(most_floats / kShareOfQueries / d, kQueriesPerPack, kQueriesPerBlock);
  return divide_up(divide_up(N, divide_up(N, most)), kQueriesPerPack) * kQueriesPerPack;
}

}  // namespace

int64_t Plan::codes_per_tile() const { return first_pass ? revq::first_pass(isa)->lanes * cell : 1; }

int64_t Plan::codes_per_run() const { return codes_per_tile() * tiles; }

// A register more than the minima take: rows at multiples of 2 KB would share two sets of the first-level cache.
int64_t Plan::minima_stride() const { return (tiles + 1) * revq::first_pass(isa)->lanes; }

int64_t Plan::floats() const {
  const int64_t rows = (queries + kQueriesPerPack) * d + 16;
  return first_pass ? 3 * rows + codes_per_run() * (d + 1) + kQueriesPerSweep * minima_stride() : rows;
}

Plan make_first_pass_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t most_floats) {
  Plan plan{.isa = isa, .first_pass = true, .d = d, .queries = queries_per_block(N, d, most_floats)};
  const int64_t lanes = first_pass(isa)->lanes;
  plan.cell = kMaxCell;
  const auto too_large = [&] {
    return plan.cell * d > kNumbersPerCell || plan.cell * plan.cell * kCodesPerSquare > K || plan.cell * lanes * 2 > K;
  };
  while (plan.cell > kVectorsPerPanel && too_large()) plan.cell /= 2;
  const int64_t all = divide_up(K, plan.codes_per_tile());
  const int64_t most = std::max<int64_t>(
      1, std::min(kMinimaFloats / (kQueriesPerSweep * lanes), kPanelFloats / (plan.codes_per_tile() * (d + 1))));
  plan.tiles = divide_up(all, divide_up(all, most));
  while (plan.tiles > 1 && plan.floats() > most_floats) plan.tiles = divide_up(plan.tiles, 2);
  return plan;
}

Plan make_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t most_floats) {
  if (N >= kMinQueries && K >= kMinCodes && K * (d + kNumbersPerKey) >= kMinNumbers && d <= kMaxFirstPassDim) {
    return make_first_pass_plan(isa, N, K, d, most_floats);
  }
  const int64_t tiles = std::clamp<int64_t>(kPanelFloats / d, 1, K);
  return {.isa = isa, .d = d, .queries = queries_per_block(N, d, most_floats), .tiles = tiles};
}

}  // namespace revq
