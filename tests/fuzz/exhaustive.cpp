// The contract's index by exhaustive search.  Shares no code with csrc/, which is compared with it.  Built by
// tests/fuzz/soak.py with -ffp-contract=off.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kTile = 256;  // codes whose distances exist at a time; their elements are contiguous
constexpr int64_t kBlock = 4;   // queries that share one load of a code

// Exact distances to a tile's first `count` codes: summed in the order of d, each operation rounded to float32.  Codes
// are stored as columns [d][kTile].
template <int64_t kQueries>
void distances(const float* x, int64_t step, const float* columns, int64_t count, int64_t d, float (*total)[kTile]) {
  for (int64_t q = 0; q < kQueries; ++q) {
    for (int64_t k = 0; k < count; ++k) {
      const float difference = x[q * step] - columns[k];
      total[q][k] = difference * difference;
    }
  }
  for (int64_t j = 1; j < d; ++j) {
    const float* column = columns + j * kTile;
    for (int64_t q = 0; q < kQueries; ++q) {
      const float value = x[q * step + j];
      float* sums = total[q];
      for (int64_t k = 0; k < count; ++k) {
        const float difference = value - column[k];
        sums[k] = sums[k] + difference * difference;
      }
    }
  }
}

struct Best {
  int32_t key = 0;
  int64_t index = -1;

  // The bits of nonnegative floats have the order of their values, and integer minima vectorize.  A NaN becomes -1, which
  // sorts before every distance; the first NaN wins.
  void take(const float* total, int64_t count, int64_t first) {
    alignas(64) int32_t keys[kTile];
    for (int64_t k = 0; k < count; ++k) {
      keys[k] = total[k] != total[k] ? -1 : __builtin_bit_cast(int32_t, total[k]);
    }
    int32_t smallest = keys[0];
    for (int64_t k = 1; k < count; ++k) smallest = keys[k] < smallest ? keys[k] : smallest;
    if (index >= 0 && smallest >= key) return;
    int64_t place = 0;
    while (keys[place] != smallest) ++place;
    key = smallest;
    index = first + place;
  }
};

template <int64_t kQueries>
void nearest(const float* x, int64_t step, const float* columns, int64_t K, int64_t d, int64_t* indices, int64_t G) {
  alignas(64) static thread_local float total[kBlock][kTile];
  Best best[kQueries];
  for (int64_t first = 0; first < K; first += kTile) {
    const int64_t count = K - first < kTile ? K - first : kTile;
    distances<kQueries>(x, step, columns + first * d, count, d, total);
    for (int64_t q = 0; q < kQueries; ++q) best[q].take(total[q], count, first);
  }
  for (int64_t q = 0; q < kQueries; ++q) indices[q * G] = best[q].index;
}

template <class Work>
void in_threads(int64_t threads, Work work) {
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(int64_t{0});
  for (auto& other : others) other.join();
}

}  // namespace

extern "C" int64_t tile_codes() { return kTile; }

// x [N][G][d], columns [G][tiles][d][kTile] -> indices [N][G].
extern "C" void exhaustive(const float* x, const float* columns, int64_t N, int64_t G, int64_t K, int64_t d,
                           int64_t threads, int64_t* indices) {
  std::atomic<int64_t> next{0};
  const int64_t blocks = (N + kBlock - 1) / kBlock, padded = (K + kTile - 1) / kTile * kTile;
  in_threads(threads, [&](int64_t) {
    for (int64_t item = next++; item < blocks * G; item = next++) {
      const int64_t g = item / blocks, n = item % blocks * kBlock, count = N - n < kBlock ? N - n : kBlock;
      const float *queries = x + (n * G + g) * d, *codes = columns + g * d * padded;
      int64_t* out = indices + n * G + g;
      if (count == kBlock) {
        nearest<kBlock>(queries, G * d, codes, K, d, out, G);
      } else {
        for (int64_t q = 0; q < count; ++q) nearest<1>(queries + q * G * d, G * d, codes, K, d, out + q * G, G);
      }
    }
  });
}
