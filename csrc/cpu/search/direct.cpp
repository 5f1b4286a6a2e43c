// A tile of packed codes at a time.  The result is the contract's by construction: no bound is needed.
#include "cpu/search/direct.h"

#include <algorithm>

namespace revq {
namespace {

// A tile stays in the first-level cache beside a step's queries.
constexpr int64_t kTileFloats = 4 * 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void DirectSearch::search(const float* queries, const std::vector<int64_t>& named, CodeRows codes, int64_t first,
                          int64_t* keys) {
  const int64_t step = std::max<int64_t>(1, kTileFloats / (kLanes * d_)), panels = divide_up(codes.count, kLanes);
  panels_.resize(std::max<size_t>(panels_.size(), std::min(step, panels) * kLanes * d_));
  for (int64_t panel = 0; panel < panels; panel += step) {
    const int64_t here = std::min(step, panels - panel), begin = panel * kLanes;
    const CodeRows some{codes.rows + begin * codes.stride, codes.stride, std::min(here * kLanes, codes.count - begin)};
    pass_->pack_plain(some, d_, zeros_.data(), panels_.data());
    tile_({queries, named.data(), static_cast<int64_t>(named.size()), d_, panels_.data(), here, first + begin, keys});
  }
}

}  // namespace revq
