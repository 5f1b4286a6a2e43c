// The scores of the first pass: the only loop that runs once per pair of query and code.  The rows of a panel decide
// between two shapes of register blocking.  `A` is the arithmetic: float32, or pairs of int16.
namespace revq::REVQ_ISA {
namespace {

// A row of a panel holds one element of each code; scores are float32.
struct Float32 {
  using Vector = Floats;
  static REVQ_INLINE Vector codes(const float* from) { return load<Floats>(from); }
  static REVQ_INLINE Vector query(const float* from) { return broadcast(*from); }
  static REVQ_INLINE Vector excluded() { return broadcast(kExcluded); }
  static REVQ_INLINE Vector add_product(Vector sum, Vector a, Vector b) { return multiply_add(a, b, sum); }
  static REVQ_INLINE Vector least(Vector a, Vector b) { return smaller(a, b); }
  static REVQ_INLINE Floats to_floats(Vector value) { return value; }
};

// Small d: Q queries stay in registers, and the codes stream past, read once per Q queries.  The two vectors of a panel
// go side by side: a multiply-add takes several cycles and more than one can start in each.
template <class A, int D, int Q>
REVQ_INLINE void score_resident(const float* queries, const float* tile, int64_t cell, float* minima, int64_t stride) {
  using Vector = typename A::Vector;
  Vector x[Q][D], least[Q];
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) {
    least[q] = A::excluded();
#pragma GCC unroll 16
    for (int j = 0; j < D; ++j) x[q][j] = A::query(queries + j * kQueriesPerPack + q);
  }
  for (int64_t i = 0; i < cell; i += kVectorsPerPanel) {
    const float* codes = tile + i * (D + 1) * kLanes;
    Vector score[Q][kVectorsPerPanel];
#pragma GCC unroll 16
    for (int j = 0; j <= D; ++j) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsPerPanel; ++v, codes += kLanes) {
        Vector c = A::codes(codes);
        pin(c);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) score[q][v] = j == 0 ? c : A::add_product(score[q][v], x[q][j == 0 ? 0 : j - 1], c);
      }
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) least[q] = A::least(least[q], A::least(score[q][0], score[q][1]));
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) store(minima + q * stride, A::to_floats(least[q]));
}

// Any d, blocked like a matrix product: Q x 2 vectors of scores stay in registers, queries and codes stream past.
template <class A, int Q>
REVQ_INLINE void score_streamed(const float* queries, const float* tile, int64_t rows, int64_t cell, float* minima,
                                int64_t stride) {
  using Vector = typename A::Vector;
  for (int64_t i = 0; i < cell; i += kVectorsPerPanel) {
    const float* codes = tile + i * (rows + 1) * kLanes;
    Vector score[Q][2];
    const Vector first = A::codes(codes), second = A::codes(codes + kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      score[q][0] = first;
      score[q][1] = second;
    }
    const float* x = queries;
    for (int64_t j = 0; j < rows; ++j) {
      codes += kVectorsPerPanel * kLanes;
      Vector c0 = A::codes(codes), c1 = A::codes(codes + kLanes);
      pin(c0);
      pin(c1);
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) {
        Vector value = A::query(x + q);
        pin(value);
        score[q][0] = A::add_product(score[q][0], value, c0);
        score[q][1] = A::add_product(score[q][1], value, c1);
      }
      x += kQueriesPerPack;
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      Floats least = A::to_floats(A::least(score[q][0], score[q][1]));
      if (i > 0) least = smaller(least, load<Floats>(minima + q * stride));
      store(minima + q * stride, least);
    }
  }
}

// The loop over tiles is the outer one: a tile stays in the first-level cache while all queries pass.
template <class A, int D, int Q>
void score_tiles(const Scores& s) {
  const int64_t stride = s.stride, tile_size = s.cell * (s.rows + 1) * kLanes;
  for (int64_t t = 0; t < s.tiles; ++t) {
    const float* tile = s.panels + t * tile_size;
    float* minima = s.minima + t * kLanes;
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

// The last number is how many queries go together: as many as leave registers for their scores and a vector of codes.
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
}  // namespace revq::REVQ_ISA
