// The scores: the only loop that runs once per pair.  Two shapes of register blocking, by d.
namespace {

// Small d: Q queries stay in registers, and the codes stream past, read once per Q queries.  A panel's two vectors go
// side by side, for a multiply-add takes four cycles and two can start in each.
template <int D, int Q>
REVQ_INLINE void score_resident(const float* queries, const float* tile, int64_t cell, float* minima, int64_t stride) {
  Vec x[Q][D], least[Q];
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) {
    least[q] = everywhere(kExcluded);
#pragma GCC unroll 16
    for (int j = 0; j < D; ++j) x[q][j] = everywhere(queries[j * kQueriesPerPack + q]);
  }
  for (int64_t i = 0; i < cell; i += kVectorsPerPanel) {
    const float* codes = tile + i * (D + 1) * kFirstLanes;
    Vec score[Q][kVectorsPerPanel];
#pragma GCC unroll 16
    for (int j = 0; j <= D; ++j) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectorsPerPanel; ++v, codes += kFirstLanes) {
        Vec c = load_as<Vec>(codes);
        pin(c);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) score[q][v] = j == 0 ? c : multiply_add(x[q][j == 0 ? 0 : j - 1], c, score[q][v]);
      }
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) least[q] = smaller(least[q], smaller(score[q][0], score[q][1]));
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) store_as(minima + q * stride, least[q]);
}

// Any d, as a matrix product does it: Q x 2 vectors of scores stay in registers, queries and codes stream past them.
template <int Q>
REVQ_INLINE void score_streamed(const float* queries, const float* tile, int64_t d, int64_t cell, float* minima,
                                int64_t stride) {
  for (int64_t i = 0; i < cell; i += kVectorsPerPanel) {
    const float* codes = tile + i * (d + 1) * kFirstLanes;
    Vec score[Q][2];
    const Vec first = load_as<Vec>(codes), second = load_as<Vec>(codes + kFirstLanes);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      score[q][0] = first;
      score[q][1] = second;
    }
    const float* x = queries;
    for (int64_t j = 0; j < d; ++j) {
      codes += kVectorsPerPanel * kFirstLanes;
      Vec c0 = load_as<Vec>(codes), c1 = load_as<Vec>(codes + kFirstLanes);
      pin(c0);
      pin(c1);
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) {
        Vec value = everywhere(x[q]);
        pin(value);
        score[q][0] = multiply_add(value, c0, score[q][0]);
        score[q][1] = multiply_add(value, c1, score[q][1]);
      }
      x += kQueriesPerPack;
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      Vec least = smaller(score[q][0], score[q][1]);
      if (i > 0) least = smaller(least, load_as<Vec>(minima + q * stride));
      store_as(minima + q * stride, least);
    }
  }
}

// Tiles outside, so that one tile stays in the first-level cache while all queries pass.
template <int D, int Q>
void score_tiles(const Scores& s) {
  const int64_t stride = s.stride, tile_size = s.cell * (s.d + 1) * kFirstLanes;
  for (int64_t t = 0; t < s.tiles; ++t) {
    const float* tile = s.panels + t * tile_size;
    float* minima = s.minima + t * kFirstLanes;
    for (int64_t q = 0; q < s.count; q += Q) {
      const float* x = s.queries + q / kQueriesPerPack * kQueriesPerPack * s.d + q % kQueriesPerPack;
      if constexpr (D > 0) {
        score_resident<D, Q>(x, tile, s.cell, minima + q * stride, stride);
      } else if (Q == 12 && s.count - q <= 4) {  // the last queries
        score_streamed<4>(x, tile, s.d, s.cell, minima + q * stride, stride);
      } else {
        score_streamed<Q>(x, tile, s.d, s.cell, minima + q * stride, stride);
      }
    }
  }
}

// As many queries as leave registers for their scores, one code and its norm.
void score(const Scores& s) {
#if REVQ_LANES == 16
  switch (s.d) {
    case 1: return score_tiles<1, 6>(s);
    case 2: return score_tiles<2, 6>(s);
    case 3: return score_tiles<3, 4>(s);
    case 4: return score_tiles<4, 4>(s);
    case 5: return score_tiles<5, 3>(s);
    case 6: return score_tiles<6, 3>(s);
    case 7: return score_tiles<7, 3>(s);
    case 8: return score_tiles<8, 3>(s);
    default: return score_tiles<0, 12>(s);
  }
#else
  switch (s.d) {
    case 1: return score_tiles<1, 4>(s);
    case 2: return score_tiles<2, 3>(s);
    case 3: return score_tiles<3, 2>(s);
    case 4: return score_tiles<4, 2>(s);
    default: return score_tiles<0, 6>(s);
  }
#endif
}

}  // namespace
