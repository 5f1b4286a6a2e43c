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
typedef int64_t Longs __attribute__((vector_size(4 * (REVQ_LANES == 16 ? 16 : 8))));
#if REVQ_LANES == 16
constexpr Ints kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr Longs kPlaces = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Ints kNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr Longs kPlaces = {0, 1, 2, 3};
#endif
constexpr int kHalves = kLanes / kWidth;
// As many as leave registers for the codes.
constexpr int64_t kQueriesPerStep = REVQ_LANES == 16 ? 4 : 2;

inline __attribute__((always_inline)) Floats load_floats(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline __attribute__((always_inline)) Floats broadcast(float value) {
  return value - Floats{};  // the compiler knows that this is a copy
}

// The upper word of the key, the bits of a distance, which is never negative, or -1 for a NaN, before every number; and
// where it stands.  Strictly smaller: among equals the earlier panel stays.
inline __attribute__((always_inline)) void keep_smaller(Floats distance, int32_t here, Ints& key, Ints& panel) {
#if REVQ_LANES == 16  // written out: gcc compares twice
  const __mmask16 is_nan = _mm512_cmp_ps_mask(distance, distance, _CMP_UNORD_Q);
  const __m512i candidate = _mm512_mask_mov_epi32((__m512i)distance, is_nan, _mm512_set1_epi32(-1));
  const __mmask16 nearer = _mm512_cmplt_epi32_mask(candidate, (__m512i)key);
  key = (Ints)_mm512_min_epi32(candidate, (__m512i)key);
  panel = (Ints)_mm512_mask_mov_epi32((__m512i)panel, nearer, _mm512_set1_epi32(here));
#else
  const Ints candidate = (Ints)distance | (Ints)(distance != distance);
  const Ints nearer = candidate < key;
  key = nearer ? candidate : key;
  panel = nearer ? Ints{} + here : panel;
#endif
}

inline __attribute__((always_inline)) Longs smaller_key(Longs a, Longs b) { return a < b ? a : b; }

// The smallest of the keys whose words stand in the lanes of two registers.
inline __attribute__((always_inline)) Longs keys_of_pairs(Ints upper, Ints lower) {
  const Ints low = kNumbers / 2 + kNumbers % 2 * static_cast<int32_t>(kWidth);
  const Ints high = low + static_cast<int32_t>(kWidth / 2);
  return smaller_key((Longs)__builtin_shuffle(lower, upper, low), (Longs)__builtin_shuffle(lower, upper, high));
}

inline __attribute__((always_inline)) int64_t smallest_key(Longs keys) {
#pragma GCC unroll 3
  for (int64_t step = kWidth / 4; step > 0; step /= 2) {
    keys = smaller_key(keys, __builtin_shuffle(keys, kPlaces ^ step));
  }
  return keys[0];
}

// D is d, or 0 where the compiler is not to know it.
template <int D>
void search_tile_in(const Tile& tile) {
  const int64_t d = D > 0 ? D : tile.d;
  for (int64_t q = 0; q < tile.count; q += kQueriesPerStep) {
    const float* x[kQueriesPerStep];
    for (int64_t i = 0; i < kQueriesPerStep; ++i) {  // the last query stands in for those that are missing
      x[i] = tile.queries + tile.named[q + i < tile.count ? q + i : tile.count - 1] * d;
    }
    Ints key[kQueriesPerStep][kHalves], panel[kQueriesPerStep][kHalves];
    for (int64_t i = 0; i < kQueriesPerStep; ++i) {
      for (int h = 0; h < kHalves; ++h) {
        key[i][h] = Ints{} + INT32_MAX;  // no distance has these bits
        panel[i][h] = Ints{};
      }
    }
    const float* codes = tile.panels;
    for (int64_t p = 0; p < tile.num_panels; ++p) {
      Floats distance[kQueriesPerStep][kHalves];
      for (int h = 0; h < kHalves; ++h) {
        const Floats c = load_floats(codes + h * kWidth);
        for (int64_t i = 0; i < kQueriesPerStep; ++i) {
          const Floats difference = broadcast(x[i][0]) - c;
          distance[i][h] = difference * difference;
        }
      }
      codes += kLanes;
      for (int64_t j = 1; j < d; ++j, codes += kLanes) {
        for (int h = 0; h < kHalves; ++h) {
          const Floats c = load_floats(codes + h * kWidth);
          for (int64_t i = 0; i < kQueriesPerStep; ++i) {
            const Floats difference = broadcast(x[i][j]) - c;
            distance[i][h] = distance[i][h] + difference * difference;
          }
        }
      }
      for (int64_t i = 0; i < kQueriesPerStep; ++i) {
        for (int h = 0; h < kHalves; ++h) {
          keep_smaller(distance[i][h], static_cast<int32_t>(p), key[i][h], panel[i][h]);
        }
      }
    }
    for (int64_t i = 0; i < kQueriesPerStep && q + i < tile.count; ++i) {
      Longs keys;
      for (int h = 0; h < kHalves; ++h) {
        const Ints code = panel[i][h] * static_cast<int32_t>(kLanes) + kNumbers + h * static_cast<int32_t>(kWidth);
        const Longs here = keys_of_pairs(key[i][h], code);
        keys = h == 0 ? here : smaller_key(keys, here);
      }
      int64_t& smallest = tile.keys[tile.named[q + i]];
      const int64_t found = smallest_key(keys) + tile.first;
      smallest = found < smallest ? found : smallest;
    }
  }
}

}  // namespace

void search_tile(const Tile& tile) {
  switch (tile.d) {
    case 1: return search_tile_in<1>(tile);
    case 2: return search_tile_in<2>(tile);
    case 3: return search_tile_in<3>(tile);
    case 4: return search_tile_in<4>(tile);
    case 8: return search_tile_in<8>(tile);
    default: return search_tile_in<0>(tile);
  }
}
