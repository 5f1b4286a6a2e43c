// A tile of packed codes at a time.  The result is the contract's by construction: no bound is needed.
#include "direct.h"

#include <algorithm>
#include <limits>

namespace revq {
namespace {

// A tile stays in the first-level cache beside a step's queries.
constexpr int64_t kTileFloats = 4 * 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void DirectSearch::search(const float* queries, const std::vector<int64_t>& named, CodeRows codes, int64_t first,
                          int64_t* keys) {
  const auto count = static_cast<int64_t>(named.size()), padded = divide_up(count, kQueriesPerStep) * kQueriesPerStep;
  const int64_t step = std::max<int64_t>(1, kTileFloats / (kLanes * d_)), panels = divide_up(codes.count, kLanes);
  queries_.resize(std::max<size_t>(queries_.size(), padded * d_));
  panels_.resize(step * kLanes * d_);
  best_.resize(std::max<size_t>(best_.size(), padded));
  for (int64_t i = 0; i < padded; ++i) {
    std::copy_n(queries + named[std::min(i, count - 1)] * d_, d_, queries_.data() + i * d_);
    std::fill_n(best_[i].key, kLanes, std::numeric_limits<int32_t>::max());
    std::fill_n(best_[i].panel, kLanes, 0);
  }
  for (int64_t panel = 0; panel < panels; panel += step) {
    const int64_t here = std::min(step, panels - panel), begin = panel * kLanes;
    const CodeRows some{codes.rows + begin * codes.stride, codes.stride, std::min(here * kLanes, codes.count - begin)};
    pass_->pack_plain(some, d_, zeros_.data(), panels_.data());
    tile_(queries_.data(), padded, d_, panels_.data(), here, static_cast<int32_t>(panel), best_.data());
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t& key = keys[named[i]];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t code = first + int64_t{best_[i].panel[lane]} * kLanes + lane;
      key = std::min(key, int64_t{best_[i].key[lane]} * (int64_t{1} << 32) + code);
    }
  }
}

}  // namespace revq
