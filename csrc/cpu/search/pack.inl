// Packing: rows of vectors become columns, four elements at a time.
namespace revq::REVQ_ISA {
namespace {

// Rows at equal distances.  Four pointers and a step are enough for the addresses of all lanes.
struct Strided {
  const float* four[4];
  int64_t step;
  REVQ_INLINE Strided(const float* base, int64_t stride)
      : four{base, base + stride, base + 2 * stride, base + 3 * stride}, step(4 * stride) {}
  REVQ_INLINE const float* operator()(int64_t lane) const { return four[lane % 4] + lane / 4 * step; }
};

// Writes element j of row(0), row(1), .., one row per lane of V, minus the center's, to to[j * stride]; with kNegate the
// center's minus the row's.  Returns the sum of squares of each lane, summed in some order (0 with kNegate).  D is the
// code dimension where the compiler knows it, else 0.
template <typename V, bool kNegate, int D, typename Row>
REVQ_INLINE V pack_rows(const Row& row, int64_t d, const float* center, float* to, int64_t stride) {
  constexpr int64_t kRows = sizeof(V) / 4;
  if constexpr (D > 0) d = D;
  V sums[4] = {};
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    const V m = repeat_quad<V>(center + j);
    V r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V value = load_quads<V>([&](int64_t lane) { return row(lane + i); }, j);
      r[i] = kNegate ? m - value : value - m;
    }
    transpose(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(to + (j + i) * stride, r[i]);
      if constexpr (!kNegate) sums[i] = multiply_add(r[i], r[i], sums[i]);
    }
  }
  for (; j < d; ++j) {
    float column[kRows];
    for (int64_t i = 0; i < kRows; ++i) column[i] = kNegate ? center[j] - row(i)[j] : row(i)[j] - center[j];
    const V value = load<V>(column);
    store(to + j * stride, value);
    if constexpr (!kNegate) sums[0] = multiply_add(value, value, sums[0]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Makes a lane win for no query: a padding lane, or a code that is too far away or not finite.
void exclude(float* panel, int64_t d, int64_t lane) {
  constexpr int64_t kRow = kVectorsPerPanel * kLanes;
  panel[lane] = kExcluded;
  for (int64_t j = 1; j <= d; ++j) panel[j * kRow + lane] = 0.0f;
}

// Writes row 0 of vector v of a panel, and excludes lanes that can win for no query.  `largest` becomes at least the half
// norm of every other lane.  Returns false when a code holds a NaN.
REVQ_INLINE bool finish_vector(float* panel, int64_t d, int64_t v, Floats squared_norms, Floats& largest) {
  float* half_norms = panel + v * kLanes;
  Floats halves = squared_norms * broadcast(0.5f);
  store(half_norms, halves);
  bool no_nan = true;
  if (lanes_at_most(halves, broadcast(kOutlier)) != (1u << kLanes) - 1) {
    float kept[kLanes] = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (half_norms[lane] <= kOutlier) {
        kept[lane] = half_norms[lane];
      } else {
        no_nan = no_nan && half_norms[lane] == half_norms[lane];
        exclude(panel, d, v * kLanes + lane);
      }
    }
    halves = load<Floats>(kept);
  }
  largest = larger(largest, halves);
  return no_nan;
}

template <int D>
float pack_tiles(CodeRows codes, int64_t d, const float* center, int64_t cell, int64_t tiles, float* panel) {
  constexpr int64_t kRow = kVectorsPerPanel * kLanes;
  bool no_nan = true;
  Floats largest = broadcast(0.0f);
  for (int64_t first = 0; first < tiles * kLanes * cell; first += kLanes * cell) {
    const int64_t left = codes.count - first;
    for (int64_t i = 0; i < cell; ++i) {
      const int64_t v = i % kVectorsPerPanel;
      const float* base = codes.rows + (first + i) * codes.stride;
      float* to = panel + kRow + v * kLanes;
      if (left >= kLanes * cell) {
        // Prefetches the rows of the next tile: the reads below step over them, which no hardware prefetcher follows.
        const float* next = codes.rows + (first + kLanes * (cell + i)) * codes.stride;
        for (int64_t j = 0; j < kLanes * codes.stride; j += 16) __builtin_prefetch(next + j);
        const Floats sums = pack_rows<Floats, false, D>(Strided(base, cell * codes.stride), d, center, to, kRow);
        no_nan = finish_vector(panel, d, v, sums, largest) && no_nan;
      } else {  // the last tile: lanes past the last code repeat it, and are excluded
        const auto clamped = [&](int64_t lane) {
          const int64_t code = lane * cell + i;
          return codes.rows + (first + (code < left ? code : left - 1)) * codes.stride;
        };
        const Floats sums = pack_rows<Floats, false, D>(clamped, d, center, to, kRow);
        no_nan = finish_vector(panel, d, v, sums, largest) && no_nan;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          if (lane * cell + i >= left) exclude(panel, d, v * kLanes + lane);
        }
      }
      if (v == kVectorsPerPanel - 1) panel += (d + 1) * kRow;
    }
  }
  return no_nan ? largest_value(largest) : __builtin_nanf("");
}

float pack_codes(CodeRows codes, int64_t d, const float* center, int64_t cell, int64_t tiles, float* panels) {
  if (d == 4) return pack_tiles<4>(codes, d, center, cell, tiles, panels);
  if (d == 8) return pack_tiles<8>(codes, d, center, cell, tiles, panels);
  return pack_tiles<0>(codes, d, center, cell, tiles, panels);
}

template <int D>
void pack_exact_in(CodeRows codes, int64_t d, const float* zeros, float* panels) {
  for (int64_t first = 0; first < codes.count; first += kPanelCodes, panels += d * kPanelCodes) {
    for (int64_t lane = 0; lane < kPanelCodes; lane += kLanes) {
      const int64_t begin = first + lane;
      if (begin + kLanes <= codes.count) {
        const Strided rows(codes.rows + begin * codes.stride, codes.stride);
        pack_rows<Floats, false, D>(rows, d, zeros, panels + lane, kPanelCodes);
      } else {
        const auto clamped = [&](int64_t i) {
          return codes.rows + (begin + i < codes.count ? begin + i : codes.count - 1) * codes.stride;
        };
        pack_rows<Floats, false, D>(clamped, d, zeros, panels + lane, kPanelCodes);
      }
    }
  }
}

void pack_exact(CodeRows codes, int64_t d, const float* zeros, float* panels) {
  if (d == 4) return pack_exact_in<4>(codes, d, zeros, panels);
  if (d == 8) return pack_exact_in<8>(codes, d, zeros, panels);
  return pack_exact_in<0>(codes, d, zeros, panels);
}

// |x'|^2 in double; the differences are rounded to float32, as in x'.
REVQ_INLINE double squared_norm(const float* row, const float* center, int64_t d) {
  DoubleQuad sums[2] = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const FloatQuad value = load<FloatQuad>(row + j + 4 * i) - load<FloatQuad>(center + j + 4 * i);
      const DoubleQuad exact = __builtin_convertvector(value, DoubleQuad);
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
      pack_rows<FloatQuad, true, 0>([&](int64_t r) { return four[r]; }, d, center, packed + quad, kQueriesPerPack);
      for (int64_t r = 0; r < 4; ++r) {
        if (norms[first + quad + r] <= kMaxNorm) continue;
        for (int64_t j = 0; j < d; ++j) packed[j * kQueriesPerPack + quad + r] = 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace revq::REVQ_ISA
