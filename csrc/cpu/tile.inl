// The tile itself, compiled once per instruction set (tile_*.cpp) with the same source, and hence the same roundings:
// every subtraction, product and sum is rounded to float32 on its own (-ffp-contract=off), in index order.
// Only the width of a register differs between the clones.

#ifdef __FAST_MATH__
#error "-ffast-math changes distances: the exactness contract forbids it"
#endif

namespace {

constexpr int64_t kWidth = REVQ_LANES == 16 ? 16 : 8;
typedef float Floats __attribute__((vector_size(4 * (REVQ_LANES == 16 ? 16 : 8))));
typedef int32_t Ints __attribute__((vector_size(4 * (REVQ_LANES == 16 ? 16 : 8))));
constexpr int kHalves = kLanes / kWidth;

inline __attribute__((always_inline)) Floats load_floats(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline __attribute__((always_inline)) Floats broadcast(float value) {
  return value - Floats{};  // the compiler knows that this is a copy
}

// The upper word of the key: the bits of a distance, which is never negative, or -1 for a NaN, before every number.
inline __attribute__((always_inline)) Ints key_of(Floats distance) {
  return (Ints)distance | (Ints)(distance != distance);
}

}  // namespace

void search_tile(const float* queries, int64_t count, int64_t d, const float* panels, int64_t num_panels,
                 int32_t first_panel, Best* best) {
  for (int64_t q = 0; q < count; q += kQueriesPerStep) {
    Ints key[kQueriesPerStep][kHalves], panel[kQueriesPerStep][kHalves];
    for (int64_t i = 0; i < kQueriesPerStep; ++i) {
      __builtin_memcpy(key[i], best[q + i].key, sizeof key[i]);
      __builtin_memcpy(panel[i], best[q + i].panel, sizeof panel[i]);
    }
    const float* x = queries + q * d;
    for (int64_t p = 0; p < num_panels; ++p) {
      const float* codes = panels + p * d * kLanes;
      Floats distance[kQueriesPerStep][kHalves];
      for (int h = 0; h < kHalves; ++h) {
        const Floats c = load_floats(codes + h * kWidth);
        for (int64_t i = 0; i < kQueriesPerStep; ++i) {
          const Floats difference = broadcast(x[i * d]) - c;
          distance[i][h] = difference * difference;
        }
      }
      for (int64_t j = 1; j < d; ++j) {
        for (int h = 0; h < kHalves; ++h) {
          const Floats c = load_floats(codes + j * kLanes + h * kWidth);
          for (int64_t i = 0; i < kQueriesPerStep; ++i) {
            const Floats difference = broadcast(x[i * d + j]) - c;
            distance[i][h] = distance[i][h] + difference * difference;
          }
        }
      }
      const int32_t here = first_panel + static_cast<int32_t>(p);
      for (int64_t i = 0; i < kQueriesPerStep; ++i) {
        for (int h = 0; h < kHalves; ++h) {
          const Ints candidate = key_of(distance[i][h]);
          const Ints nearer = candidate < key[i][h];  // strictly: among equals the earlier panel stays
          key[i][h] = nearer ? candidate : key[i][h];
          panel[i][h] = nearer ? Ints{} + here : panel[i][h];
        }
      }
    }
    for (int64_t i = 0; i < kQueriesPerStep; ++i) {
      __builtin_memcpy(best[q + i].key, key[i], sizeof key[i]);
      __builtin_memcpy(best[q + i].panel, panel[i], sizeof panel[i]);
    }
  }
}
