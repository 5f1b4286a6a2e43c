// Packing for the first pass: rows become columns, four numbers at a time.
namespace {

// Rows at equal distances; the compiler keeps four pointers and three steps.
struct Strided {
  const float* four[4];
  int64_t step;
  REVQ_INLINE Strided(const float* base, int64_t stride)
      : four{base, base + stride, base + 2 * stride, base + 3 * stride}, step(4 * stride) {}
  REVQ_INLINE const float* operator()(int64_t lane) const { return four[lane % 4] + lane / 4 * step; }
};

// Numbers j of row(0), row(1), .., a row per lane of V, centered, to to[j * stride]; kNegate centers the other way
// round.  Returns the sums of their squares, in some order.  D is d, or 0 where the compiler is not to know it.
template <typename V, bool kNegate, int D, typename Row>
REVQ_INLINE V pack_rows(const Row& row, int64_t d, const float* center, float* to, int64_t stride) {
  constexpr int64_t kRows = sizeof(V) / 4;
  if constexpr (D > 0) d = D;
  V sums[4] = {};
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    const V m = repeat<V>(center + j);
    V r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V value = load_fours<V>([&](int64_t lane) { return row(lane + i); }, j);
      r[i] = kNegate ? m - value : value - m;
    }
    transpose(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store_as(to + (j + i) * stride, r[i]);
      if constexpr (!kNegate) sums[i] = multiply_add(r[i], r[i], sums[i]);
    }
  }
  for (; j < d; ++j) {
    float column[kRows];
    for (int64_t i = 0; i < kRows; ++i) column[i] = kNegate ? center[j] - row(i)[j] : row(i)[j] - center[j];
    const V value = load_as<V>(column);
    store_as(to + j * stride, value);
    if constexpr (!kNegate) sums[0] = multiply_add(value, value, sums[0]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A lane that can win for no query: a padding lane, or a code that is too far away or not finite.
void exclude(float* panel, int64_t d, int64_t lane) {
  constexpr int64_t kRow = kVectorsPerPanel * kFirstLanes;
  panel[lane] = kExcluded;
  for (int64_t j = 1; j <= d; ++j) panel[j * kRow + lane] = 0.0f;
}

// Row 0 of a panel's vector v, and the lanes that it excludes.  `largest` becomes at least every other lane's half norm;
// false when a code holds a NaN.
REVQ_INLINE bool finish_vector(float* panel, int64_t d, int64_t v, Vec squared_norms, Vec& largest) {
  float* half_norms = panel + v * kFirstLanes;
  Vec halves = squared_norms * everywhere(0.5f);
  store_as(half_norms, halves);
  bool numbers = true;
  if (lanes_at_most(halves, everywhere(kOutlier)) != (1u << kFirstLanes) - 1) {
    float kept[kFirstLanes] = {};
    for (int64_t lane = 0; lane < kFirstLanes; ++lane) {
      if (half_norms[lane] <= kOutlier) {
        kept[lane] = half_norms[lane];
      } else {
        numbers = numbers && half_norms[lane] == half_norms[lane];
        exclude(panel, d, v * kFirstLanes + lane);
      }
    }
    halves = load_as<Vec>(kept);
  }
  largest = larger(largest, halves);
  return numbers;
}

template <int D>
float pack_tiles(CodeRows codes, int64_t d, const float* center, int64_t cell, int64_t tiles, float* panel) {
  constexpr int64_t kRow = kVectorsPerPanel * kFirstLanes;
  bool numbers = true;
  Vec largest = everywhere(0.0f);
  for (int64_t first = 0; first < tiles * kFirstLanes * cell; first += kFirstLanes * cell) {
    const int64_t left = codes.count - first;
    for (int64_t i = 0; i < cell; ++i) {
      const int64_t v = i % kVectorsPerPanel;
      const float* base = codes.rows + (first + i) * codes.stride;
      float* to = panel + kRow + v * kFirstLanes;
      if (left >= kFirstLanes * cell) {
        // The rows of the next tile, in order: this tile's are read in steps that no prefetcher follows.
        const float* next = codes.rows + (first + kFirstLanes * (cell + i)) * codes.stride;
        for (int64_t j = 0; j < kFirstLanes * codes.stride; j += 16) __builtin_prefetch(next + j);
        const Vec sums = pack_rows<Vec, false, D>(Strided(base, cell * codes.stride), d, center, to, kRow);
        numbers = finish_vector(panel, d, v, sums, largest) && numbers;
      } else {  // the last tile: lanes past the last code repeat it, and are excluded
        const auto clamped = [&](int64_t lane) {
          const int64_t code = lane * cell + i;
          return codes.rows + (first + (code < left ? code : left - 1)) * codes.stride;
        };
        const Vec sums = pack_rows<Vec, false, D>(clamped, d, center, to, kRow);
        numbers = finish_vector(panel, d, v, sums, largest) && numbers;
        for (int64_t lane = 0; lane < kFirstLanes; ++lane) {
          if (lane * cell + i >= left) exclude(panel, d, v * kFirstLanes + lane);
        }
      }
      if (v == kVectorsPerPanel - 1) panel += (d + 1) * kRow;
    }
  }
  return numbers ? largest_lane(largest) : __builtin_nanf("");
}

float pack_codes(CodeRows codes, int64_t d, const float* center, int64_t cell, int64_t tiles, float* panels) {
  if (d == 4) return pack_tiles<4>(codes, d, center, cell, tiles, panels);
  if (d == 8) return pack_tiles<8>(codes, d, center, cell, tiles, panels);
  return pack_tiles<0>(codes, d, center, cell, tiles, panels);
}

template <int D>
void pack_plain_in(CodeRows codes, int64_t d, const float* zeros, float* panels) {
  for (int64_t first = 0; first < codes.count; first += kLanes, panels += d * kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane += kFirstLanes) {
      const int64_t begin = first + lane;
      if (begin + kFirstLanes <= codes.count) {
        const Strided rows(codes.rows + begin * codes.stride, codes.stride);
        pack_rows<Vec, false, D>(rows, d, zeros, panels + lane, kLanes);
      } else {
        const auto clamped = [&](int64_t i) {
          return codes.rows + (begin + i < codes.count ? begin + i : codes.count - 1) * codes.stride;
        };
        pack_rows<Vec, false, D>(clamped, d, zeros, panels + lane, kLanes);
      }
    }
  }
}

void pack_plain(CodeRows codes, int64_t d, const float* zeros, float* panels) {
  if (d == 4) return pack_plain_in<4>(codes, d, zeros, panels);
  if (d == 8) return pack_plain_in<8>(codes, d, zeros, panels);
  return pack_plain_in<0>(codes, d, zeros, panels);
}

// |x'|^2 in double, from the rounded differences.
REVQ_INLINE double squared_norm(const float* row, const float* center, int64_t d) {
  typedef double Doubles __attribute__((vector_size(32)));
  Doubles sums[2] = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Four value = load_as<Four>(row + j + 4 * i) - load_as<Four>(center + j + 4 * i);
      const Doubles exact = __builtin_convertvector(value, Doubles);
      sums[i] += exact * exact;
    }
  }
  double total = 0;
  for (int i = 0; i < 4; ++i) total += sums[0][i] + sums[1][i];
  for (; j < d; ++j) {
    const float value = row[j] - center[j];
    total += static_cast<double>(value) * static_cast<double>(value);
  }
  return total;
}

void pack_queries(const float* rows, int64_t count, int64_t d, const float* center, float* packed, double* norms) {
  for (int64_t first = 0; first < count; first += kQueriesPerPack, packed += kQueriesPerPack * d) {
    for (int64_t quad = 0; quad < kQueriesPerPack; quad += 4) {
      const float* four[4];
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t q = first + quad + r < count ? first + quad + r : count - 1;
        four[r] = rows + q * d;
        norms[first + quad + r] = __builtin_sqrt(squared_norm(four[r], center, d));
      }
      pack_rows<Four, true, 0>([&](int64_t r) { return four[r]; }, d, center, packed + quad, kQueriesPerPack);
      for (int64_t r = 0; r < 4; ++r) {
        if (norms[first + quad + r] <= kMaxNorm) continue;
        for (int64_t j = 0; j < d; ++j) packed[j * kQueriesPerPack + quad + r] = 0.0f;
      }
    }
  }
}

}  // namespace
