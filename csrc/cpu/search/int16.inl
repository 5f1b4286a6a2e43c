// The first pass on vectors rounded to int16.  A word (32 bits) holds two elements.  Products and sums are exact,
// because they fit into int32: block.cpp scales vectors to a length of at most kMaxScaled (certificate.h).
namespace revq::REVQ_ISA {
namespace {

struct Int16 {
  using Vector = Ints;
  static REVQ_INLINE Vector codes(const float* from) { return load<Ints>(from); }
  static REVQ_INLINE Vector query(const float* from) {
    int32_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return Ints{} + word;
  }
  static REVQ_INLINE Vector excluded() { return Ints{} + kExcludedWord; }
  static REVQ_INLINE Vector add_product(Vector sum, Vector a, Vector b) { return add_products(sum, a, b); }
  static REVQ_INLINE Vector least(Vector a, Vector b) { return smaller(a, b); }
  // int32 to float rounds, but monotonically: a score that is not greater stays not greater.
  static REVQ_INLINE Floats to_floats(Vector value) { return __builtin_convertvector(value, Floats); }
};

void round_codes(float* panels, int64_t d, int64_t count, float scale) {
  constexpr int64_t kRow = kVectorsPerPanel * kLanes;
  const int64_t rows = (d + 1) / 2;
  // This works in place.  Rows become fewer (d + 1 -> rows + 1), so each row is written where rows were read before.
  // The two registers of a row (v = 0 and 1) use different columns of the panel, so neither overwrites the other's
  // input.
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t v = 0; v < kVectorsPerPanel; ++v) {
      const float* from = panels + panel * (d + 1) * kRow + v * kLanes;
      float* to = panels + panel * (rows + 1) * kRow + v * kLanes;
      const Ints excluded = load<Floats>(from) == broadcast(kExcluded);
      Ints square = {};
      for (int64_t j = 0; j < rows; ++j) {
        const Floats low = load<Floats>(from + (2 * j + 1) * kRow) * broadcast(scale);
        const Floats high = 2 * j + 1 < d ? load<Floats>(from + (2 * j + 2) * kRow) * broadcast(scale) : Floats{};
        const Ints two = pair_of_int16(nearest_int(low), nearest_int(high));
        square = add_products(square, two, two);
        store(to + (j + 1) * kRow, two);
      }
      store(to, excluded ? Ints{} + kExcludedWord : (square + 1) >> 1);
    }
  }
}

void round_queries(const float* packed, int64_t count, int64_t d, float scale, float* rounded, int32_t* squares) {
  const int64_t rows = (d + 1) / 2;
  for (int64_t first = 0; first < count; first += kQueriesPerPack) {
    for (int64_t quad = 0; quad < kQueriesPerPack; quad += 4) {
      const float* from = packed + first * d + quad;
      IntQuad square = {};
      for (int64_t j = 0; j < rows; ++j) {
        const FloatQuad low = load<FloatQuad>(from + 2 * j * kQueriesPerPack) * scale;
        const FloatQuad high =
            2 * j + 1 < d ? load<FloatQuad>(from + (2 * j + 1) * kQueriesPerPack) * scale : FloatQuad{};
        const IntQuad two = pair_of_int16(nearest_int(low), nearest_int(high));
        square = add_products(square, two, two);
        store(rounded + first * rows + quad + j * kQueriesPerPack, two);
      }
      store(squares + first + quad, square);
    }
  }
}

}  // namespace
}  // namespace revq::REVQ_ISA
