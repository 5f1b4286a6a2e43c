// The scores: the only loop that runs once per pair.  Two shapes of register blocking, by the rows of a panel.  `A` is
// the arithmetic: float numbers, or pairs of whole ones.
namespace {

// A row holds one number of each code; scores are float.
struct FloatRows {
  using Number = Vec;
  static REVQ_INLINE Number load(const float* from) { return load_as<Vec>(from); }
  static REVQ_INLINE Number broadcast(const float* from) { return everywhere(*from); }
  static REVQ_INLINE Number excluded() { return everywhere(kExcluded); }
  static REVQ_INLINE Number add_product(Number sum, Number a, Number b) { return multiply_add(a, b, sum); }
  static REVQ_INLINE Number least(Number a, Number b) { return smaller(a, b); }
  static REVQ_INLINE Vec to_floats(Number value) { return value; }
};

// Small d: Q queries stay in registers, and the codes stream past, read once per Q queries.  A panel's two vectors go
// side by side, for a multiply-add takes four cycles and two can start in each.
template <class A, int D, int Q>
REVQ_INLINE void score_resident(const float* queries, const float* tile, int64_t cell, float* minima, int64_t stride) {
  using Number = typename A::Number;
  Number x[Q][D], least[Q];
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) {
    least[q] = A::excluded();
#pragma GCC unroll 16
    for (int j = 0; j < D; ++j) x[q][j] = A::broadcast(queries + j * kQueriesPerPack + q);
  }
  for (int64_t i = 0; i < cell; i += kVectorsPerPanel) {
    const float* codes = tile + i * (D + 1) * kFirstLanes;
    Number score[Q][kVectorsPerPanel];
#pragma GCC unroll 16
    for (int j = 0; j <= D; ++j) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsPerPanel; ++v, codes += kFirstLanes) {
        Number c = A::load(codes);
        pin(c);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) score[q][v] = j == 0 ? c : A::add_product(score[q][v], x[q][j == 0 ? 0 : j - 1], c);
      }
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) least[q] = A::least(least[q], A::least(score[q][0], score[q][1]));
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) store_as(minima + q * stride, A::to_floats(least[q]));
}

// Any d, as a matrix product does it: Q x 2 vectors of scores stay in registers, queries and codes stream past them.
template <class A, int Q>
REVQ_INLINE void score_streamed(const float* queries, const float* tile, int64_t rows, int64_t cell, float* minima,
                                int64_t stride) {
  using Number = typename A::Number;
  for (int64_t i = 0; i < cell; i += kVectorsPerPanel) {
    const float* codes = tile + i * (rows + 1) * kFirstLanes;
    Number score[Q][2];
    const Number first = A::load(codes), second = A::load(codes + kFirstLanes);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      score[q][0] = first;
      score[q][1] = second;
    }
    const float* x = queries;
    for (int64_t j = 0; j < rows; ++j) {
      codes += kVectorsPerPanel * kFirstLanes;
      Number c0 = A::load(codes), c1 = A::load(codes + kFirstLanes);
      pin(c0);
      pin(c1);
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) {
        Number value = A::broadcast(x + q);
        pin(value);
        score[q][0] = A::add_product(score[q][0], value, c0);
        score[q][1] = A::add_product(score[q][1], value, c1);
      }
      x += kQueriesPerPack;
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      Vec least = A::to_floats(A::least(score[q][0], score[q][1]));
      if (i > 0) least = smaller(least, load_as<Vec>(minima + q * stride));
      store_as(minima + q * stride, least);
    }
  }
}

// Tiles outside, so that one tile stays in the first-level cache while all queries pass.
template <class A, int D, int Q>
void score_tiles(const Scores& s) {
  const int64_t stride = s.stride, tile_size = s.cell * (s.rows + 1) * kFirstLanes;
  for (int64_t t = 0; t < s.tiles; ++t) {
    const float* tile = s.panels + t * tile_size;
    float* minima = s.minima + t * kFirstLanes;
    for (int64_t q = 0; q < s.count; q += Q) {
      const float* x = s.queries + q / kQueriesPerPack * kQueriesPerPack * s.rows + q % kQueriesPerPack;
      if constexpr (D > 0) {
        score_resident<A, D, Q>(x, tile, s.cell, minima + q * stride, stride);
      } else if (Q == 12 && s.count - q <= 4) {  // the last queries
        score_streamed<A, 4>(x, tile, s.rows, s.cell, minima + q * stride, stride);
      } else {
        score_streamed<A, Q>(x, tile, s.rows, s.cell, minima + q * stride, stride);
      }
    }
  }
}

// As many queries as leave registers for their scores, one code and its norm.
template <class A>
void score(const Scores& s) {
#if REVQ_LANES == 16
  switch (s.rows) {
    case 1: return score_tiles<A, 1, 6>(s);
    case 2: return score_tiles<A, 2, 6>(s);
    case 3: return score_tiles<A, 3, 4>(s);
    case 4: return score_tiles<A, 4, 4>(s);
    case 5: return score_tiles<A, 5, 3>(s);
    case 6: return score_tiles<A, 6, 3>(s);
    case 7: return score_tiles<A, 7, 3>(s);
    case 8: return score_tiles<A, 8, 3>(s);
    default: return score_tiles<A, 0, 12>(s);
  }
#else
  switch (s.rows) {
    case 1: return score_tiles<A, 1, 4>(s);
    case 2: return score_tiles<A, 2, 3>(s);
    case 3: return score_tiles<A, 3, 2>(s);
    case 4: return score_tiles<A, 4, 2>(s);
    default: return score_tiles<A, 0, 6>(s);
  }
#endif
}

}  // namespace
