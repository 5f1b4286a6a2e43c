// Items of uneven length, shared out one at a time: a thread that finishes early takes the next.  Items own their
// outputs, so no result depends on who did which.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "float_mode.h"

namespace revq {

// Calls work(next) on each of torch's threads; next() gives the number of an item not yet taken, or -1.
template <typename Work>
void share_work(int64_t items, const Work& work) {
  std::atomic<int64_t> taken{0};
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    const KeepDenormals guard;
    auto next = [&]() -> int64_t {
      const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
      return item < items ? item : -1;
    };
    work(next);
  });
}

}  // namespace revq
