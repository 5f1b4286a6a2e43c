// The first pass on vectors rounded to 16-bit whole numbers: a word holds two of them, and one instruction multiplies
// both and adds.  Products and sums are exact: all of them fit (certificate.h).
namespace {

typedef int32_t Words __attribute__((vector_size(4 * REVQ_LANES)));

#if REVQ_LANES == 16
REVQ_INLINE Words add_products(Words sum, Words a, Words b) {
  return (Words)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
REVQ_INLINE Words smaller(Words a, Words b) { return (Words)_mm512_min_epi32((__m512i)a, (__m512i)b); }
REVQ_INLINE Words nearest_whole(Vec value) { return (Words)_mm512_cvtps_epi32(value); }
#else
REVQ_INLINE Words add_products(Words sum, Words a, Words b) {
  return sum + (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
REVQ_INLINE Words smaller(Words a, Words b) { return (Words)_mm256_min_epi32((__m256i)a, (__m256i)b); }
REVQ_INLINE Words nearest_whole(Vec value) { return (Words)_mm256_cvtps_epi32(value); }
#endif
REVQ_INLINE FourInts nearest_whole(Four value) { return (FourInts)_mm_cvtps_epi32(value); }

// Two whole numbers of 16 bits in each word.
template <typename W>
REVQ_INLINE W two_to_a_word(W low, W high) {
  return (low & 0xFFFF) | (high << 16);
}

template <typename W>
REVQ_INLINE W load_words(const float* from) {
  W value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename W>
REVQ_INLINE void store_words(void* to, W value) {
  __builtin_memcpy(to, &value, sizeof value);
}

struct WordRows {
  using Number = Words;
  static REVQ_INLINE Number load(const float* from) { return load_words<Words>(from); }
  static REVQ_INLINE Number broadcast(const float* from) {
    int32_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return Words{} + word;
  }
  static REVQ_INLINE Number excluded() { return Words{} + kExcludedWord; }
  static REVQ_INLINE Number add_product(Number sum, Number a, Number b) { return add_products(sum, a, b); }
  static REVQ_INLINE Number least(Number a, Number b) { return smaller(a, b); }
  // Rounds, and keeps the order.
  static REVQ_INLINE Vec to_floats(Number value) { return __builtin_convertvector(value, Vec); }
};

void round_codes(float* panels, int64_t d, int64_t count, float scale) {
  constexpr int64_t kRow = kVectorsPerPanel * kFirstLanes;
  const int64_t rows = (d + 1) / 2;
  // In place: panels shrink, so a row is written where rows were that have been read, and the two vectors of a row share
  // no column.
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t v = 0; v < kVectorsPerPanel; ++v) {
      const float* from = panels + panel * (d + 1) * kRow + v * kFirstLanes;
      float* to = panels + panel * (rows + 1) * kRow + v * kFirstLanes;
      const Words excluded = load_as<Vec>(from) == everywhere(kExcluded);
      Words square = {};
      for (int64_t j = 0; j < rows; ++j) {
        const Vec low = load_as<Vec>(from + (2 * j + 1) * kRow) * everywhere(scale);
        const Vec high = 2 * j + 1 < d ? load_as<Vec>(from + (2 * j + 2) * kRow) * everywhere(scale) : Vec{};
        const Words two = two_to_a_word(nearest_whole(low), nearest_whole(high));
        square = add_products(square, two, two);
        store_words(to + (j + 1) * kRow, two);
      }
      store_words(to, excluded ? Words{} + kExcludedWord : (square + 1) >> 1);
    }
  }
}

void round_queries(const float* packed, int64_t count, int64_t d, float scale, float* rounded, int32_t* squares) {
  const int64_t rows = (d + 1) / 2;
  for (int64_t first = 0; first < count; first += kQueriesPerPack) {
    for (int64_t quad = 0; quad < kQueriesPerPack; quad += 4) {
      const float* from = packed + first * d + quad;
      FourInts square = {};
      for (int64_t j = 0; j < rows; ++j) {
        const Four low = load_as<Four>(from + 2 * j * kQueriesPerPack) * scale;
        const Four high = 2 * j + 1 < d ? load_as<Four>(from + (2 * j + 1) * kQueriesPerPack) * scale : Four{};
        const FourInts two = two_to_a_word(nearest_whole(low), nearest_whole(high));
        square = square + (FourInts)_mm_madd_epi16((__m128i)two, (__m128i)two);
        store_words(rounded + first * rows + quad + j * kQueriesPerPack, two);
      }
      store_words(squares + first + quad, square);
    }
  }
}

}  // namespace

extern const RoundedPass rounded_pass = {round_codes, round_queries, score<WordRows>};
