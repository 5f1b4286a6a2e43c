// The brute-force search: shares out blocks of queries times ranges of codes to the threads.  An item's smallest keys go
// to the output by an atomic minimum, so the result depends on no order; the last item of a block gathers and counts.
#include "cpu/search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "core/parallel.h"
#include "cpu/search/block.h"

namespace revq {
namespace {

// Lowers a key that several threads may lower.
void lower(int64_t& place, int64_t key) {
  std::atomic_ref<int64_t> shared(place);
  int64_t current = shared.load(std::memory_order_relaxed);
  while (key < current && !shared.compare_exchange_weak(current, key, std::memory_order_relaxed)) {
  }
}

struct Output {
  int64_t* indices;
  void* quantized;
  ScalarType type;
  int64_t* count;
};

class Search {
 public:
  Search(const GroupedRows& x, const Codebook& codebook, const Problem& problem, const Output& out)
      : x_(x),
        codebook_(codebook),
        problem_(problem),
        out_(out),
        threads_(static_cast<int64_t>(torch::stable::get_num_threads())),
        plan_(make_plan(cpu_isa(), problem.N, problem.K, problem.d, max_floats())),
        blocks_(divide_up(problem.N, plan_.queries)) {
    const int64_t tile = plan_.codes_per_tile();
    const int64_t wanted = threads_ == 1 ? 1 : divide_up(kItemsPerThread * threads_, problem.G * blocks_);
    const int64_t most = std::max<int64_t>(1, problem.K * problem.d / kMinElementsPerItem);
    codes_per_range_ = round_up(divide_up(problem.K, std::min(wanted, most)), tile);
    ranges_ = divide_up(problem.K, codes_per_range_);
  }

  void run() {
    const int64_t items = problem_.G * blocks_ * ranges_, workers = std::min(threads_, items);
    // The workspace of all threads in one allocation: the allocator keeps it from call to call.
    const int64_t own = round_up(plan_.floats(), 16);
    const int64_t floats = own + round_up(conversion_floats() + 2 * problem_.d, 16);
    const auto memory = std::unique_ptr<float[], Free>(
        static_cast<float*>(::operator new(sizeof(float) * floats * workers, std::align_val_t{64})));
    std::vector<std::atomic<int64_t>> left(problem_.G * blocks_);
    for (auto& l : left) l = ranges_;
    std::atomic<int64_t> started{0};
    if (ranges_ > 1) std::fill_n(out_.indices, problem_.N * problem_.G, kNoKey);
    const auto work = [&](auto& next) {
      float* workspace = memory.get() + started++ * floats;
      BlockSearch block(plan_, workspace);
      std::vector<int64_t> keys(plan_.queries);
      float* rest = workspace + own;
      for (int64_t item; (item = next()) >= 0;) {
        // The ranges of a block follow each other, and so do the groups of the same queries.
        const int64_t place = item / ranges_, group = place % problem_.G, block_number = place / problem_.G;
        search_item(group, block_number, item % ranges_, block, keys.data(), rest);
        if (left[place].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(group, block_number, rest);
      }
    };
    const bool together = ranges_ == 1 && problem_.K * problem_.d <= kMaxElementsTogether;
    share_work(items, work, together ? std::min(problem_.G, kGroupsTogether) : 1);
  }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };

  // A thread's share of the workspace; all shares together are the size of the packed codebook and kSharedWorkspace.
  int64_t max_floats() const {
    const int64_t packed = problem_.G * problem_.K * (problem_.d + 1);
    const int64_t share = (packed + kSharedWorkspace) / threads_;
    return std::min(kMaxWorkspace, codebook_.rows(0) == nullptr ? share / 2 : share);  // half for converted codes
  }

  int64_t conversion_floats() const { return codebook_.rows(0) == nullptr ? plan_.codes_per_run() * problem_.d : 0; }

  // The mean of some codes.  Any center gives the same result; one near the codes makes the first pass precise.
  void center(int64_t group, float* row, float* mean) const {
    const int64_t samples = std::min(problem_.K, kCenterSamples);
    std::fill_n(mean, problem_.d, 0.0f);
    for (int64_t i = 0; i < samples; ++i) {
      codebook_.read(group, i * problem_.K / samples, row);
      for (int64_t j = 0; j < problem_.d; ++j) mean[j] += row[j];
    }
    for (int64_t j = 0; j < problem_.d; ++j) {
      mean[j] /= static_cast<float>(samples);
      if (!std::isfinite(mean[j])) mean[j] = 0.0f;
    }
  }

  void search_item(int64_t group, int64_t block_number, int64_t range, BlockSearch& block, int64_t* keys, float* rest) {
    const int64_t first = block_number * plan_.queries, count = std::min(plan_.queries, problem_.N - first);
    float *mean = rest, *row = rest + problem_.d, *converted = rest + 2 * problem_.d;
    for (int64_t q = 0; q < count; ++q) {
      x_.read(first + q, group, block.queries() + q * problem_.d);
      int64_t& place = out_.indices[(first + q) * problem_.G + group];
      keys[q] = ranges_ == 1 ? kNoKey : std::atomic_ref<int64_t>(place).load(std::memory_order_relaxed);
    }
    if (plan_.first_pass) center(group, row, mean);
    block.begin(count, mean, keys);
    const int64_t end = std::min(problem_.K, (range + 1) * codes_per_range_);
    for (int64_t code = range * codes_per_range_; code < end; code += plan_.codes_per_run()) {
      CodeRows codes{codebook_.rows(group), codebook_.row_stride(), std::min(plan_.codes_per_run(), end - code)};
      if (codes.rows != nullptr) {
        codes.rows += code * codes.stride;
      } else {
        codebook_.read_rows(group, code, codes.count, converted);
        codes = {converted, problem_.d, codes.count};
      }
      block.search(codes, code);
    }
    for (int64_t q = 0; q < count; ++q) {
      int64_t& place = out_.indices[(first + q) * problem_.G + group];
      if (ranges_ == 1) {
        place = keys[q];
      } else {
        lower(place, keys[q]);
      }
    }
  }

  // Turns keys into indices, and gathers and counts their rows while they are in the cache.
  void finish(int64_t group, int64_t block_number, float* row) const {
    const int64_t first = block_number * plan_.queries, last = std::min(problem_.N, first + plan_.queries);
    for (int64_t n = first; n < last; ++n) {
      const int64_t place = n * problem_.G + group, code = code_of(out_.indices[place]);
      out_.indices[place] = code;
      if (out_.quantized != nullptr) {
        codebook_.read(group, code, row);
        store(out_.type, out_.quantized, place * problem_.d, problem_.d, row);
      }
      if (out_.count != nullptr) {
        int64_t& chosen = out_.count[group * problem_.K + code];
        if (blocks_ == 1) {  // no other thread counts this group
          ++chosen;
        } else {
          std::atomic_ref<int64_t>(chosen).fetch_add(1, std::memory_order_relaxed);
        }
      }
    }
  }

  const GroupedRows& x_;
  const Codebook& codebook_;
  const Problem& problem_;
  const Output out_;
  const int64_t threads_;
  const Plan plan_;
  const int64_t blocks_;  // blocks of queries per group
  int64_t codes_per_range_, ranges_;
};

}  // namespace

void search(const GroupedRows& x, const Codebook& codebook, const Problem& problem, int64_t* indices, void* quantized,
            ScalarType type, int64_t* count) {
  if (problem.N == 0) return;
  Search(x, codebook, problem, {indices, quantized, type, count}).run();
}

}  // namespace revq
