// Chooses the form of a search and its sizes: queries and codes at a time.
#include "cpu/search/plan.h"

#include <algorithm>

#include "core/sizes.h"
#include "cpu/kernels.h"
#include "cpu/search/certificate.h"

namespace revq {
namespace {

static_assert(kMaxFirstPassDim <= kMaxCertifiedDim);
static_assert(kQueriesPerSweep % kQueriesPerPack == 0, "a sweep is whole packs, of which the last may be partly full");

// The same for all blocks, and whole packs.
int64_t queries_per_block(int64_t N, int64_t d, int64_t max_floats) {
  const int64_t most = std::clamp<int64_t>(max_floats / kShareOfQueries / d, kQueriesPerPack, kQueriesPerBlock);
  return round_up(divide_up(N, divide_up(N, most)), kQueriesPerPack);
}

}  // namespace

int64_t Plan::codes_per_tile() const { return first_pass ? kernels(isa).search->lanes * cell : 1; }

int64_t Plan::codes_per_run() const { return codes_per_tile() * tiles; }

// A register more than the minima take: rows at multiples of 2 KB would share two sets of the first-level cache.
int64_t Plan::minima_stride() const { return (tiles + 1) * kernels(isa).search->lanes; }

int64_t Plan::floats() const {
  const int64_t rows = (queries + kQueriesPerPack) * d + 16;
  return first_pass ? 3 * rows + codes_per_run() * (d + 1) + kQueriesPerSweep * minima_stride() : rows;
}

Plan make_first_pass_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t max_floats) {
  Plan plan{.isa = isa, .first_pass = true, .d = d, .queries = queries_per_block(N, d, max_floats)};
  const int64_t lanes = kernels(isa).search->lanes;
  plan.cell = kMaxCell;
  const auto too_large = [&] {
    return plan.cell * d > kElementsPerCell || plan.cell * plan.cell * kCodesPerSquare > K || plan.cell * lanes * 2 > K;
  };
  while (plan.cell > kVectorsPerPanel && too_large()) plan.cell /= 2;
  const int64_t all = divide_up(K, plan.codes_per_tile());
  const int64_t most = std::max<int64_t>(
      1, std::min(kMinimaFloats / (kQueriesPerSweep * lanes), kPanelFloats / (plan.codes_per_tile() * (d + 1))));
  plan.tiles = divide_up(all, divide_up(all, most));
  while (plan.tiles > 1 && plan.floats() > max_floats) plan.tiles = divide_up(plan.tiles, 2);
  return plan;
}

Plan make_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t max_floats) {
  if (N >= kMinQueries && K >= kMinCodes && K * (d + kElementsPerKey) >= kMinElements && d <= kMaxFirstPassDim) {
    return make_first_pass_plan(isa, N, K, d, max_floats);
  }
  const int64_t tiles = std::clamp<int64_t>(kPanelFloats / d, 1, K);
  return {.isa = isa, .d = d, .queries = queries_per_block(N, d, max_floats), .tiles = tiles};
}

}  // namespace revq
