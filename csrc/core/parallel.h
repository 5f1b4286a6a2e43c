// Shares out items of uneven length, a few at a time: a thread that finishes early takes the next ones.  Items own their
// outputs, so no result depends on which thread did which item.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "core/float_mode.h"

namespace revq {

// Threads take items in portions.  Each thread should get at least this number of portions, if there are enough items:
// with fewer, all threads wait for one slow thread.
constexpr int64_t kItemsPerThread = 4;

// Calls work(next) once on each of torch's threads, or on fewer where there are fewer items; next() gives the number of an
// item that no thread has taken, or -1.  A thread takes up to `together` neighboring items at a time.
template <typename Work>
void share_work(int64_t items, const Work& work, int64_t together = 1) {
  std::atomic<int64_t> taken{0};
  const int64_t available = torch::stable::get_num_threads(), threads = std::min(items, available);
  const int64_t run = std::clamp<int64_t>(items / (kItemsPerThread * available), 1, together);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    const KeepDenormals guard;
    int64_t item = 0, last = 0;
    auto next = [&]() -> int64_t {
      if (item == last) {
        item = taken.fetch_add(run, std::memory_order_relaxed);
        last = item + run;
      }
      return item < items ? item++ : -1;
    };
    work(next);
  });
}

}  // namespace revq
