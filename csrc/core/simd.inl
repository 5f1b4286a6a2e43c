// What the first pass asks of an instruction set.  The clone's file sets REVQ_LANES; fused multiply-adds stand here and
// nowhere else, for -ffp-contract=off forbids them to the compiler.
namespace {

constexpr int64_t kFirstLanes = REVQ_LANES;
typedef float Vec __attribute__((vector_size(4 * REVQ_LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

#define REVQ_INLINE inline __attribute__((always_inline))

template <typename V>
REVQ_INLINE V load_as(const float* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
REVQ_INLINE void store_as(float* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

#if REVQ_LANES == 16
REVQ_INLINE Vec everywhere(float value) { return _mm512_set1_ps(value); }
REVQ_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
REVQ_INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
REVQ_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
REVQ_INLINE float smallest_lane(Vec a) { return _mm512_reduce_min_ps(a); }
REVQ_INLINE uint32_t lanes_at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
#elif REVQ_LANES == 8
REVQ_INLINE Vec everywhere(float value) { return _mm256_set1_ps(value); }
REVQ_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
REVQ_INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
REVQ_INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
REVQ_INLINE uint32_t lanes_at_most(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
}
#else
REVQ_INLINE Vec everywhere(float value) { return Vec{value, value, value, value}; }
REVQ_INLINE uint32_t lanes_at_most(Vec a, Vec b) {
  const auto mask = a <= b;
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
}
#if defined(__aarch64__)
REVQ_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
REVQ_INLINE Vec smaller(Vec a, Vec b) { return vminq_f32(a, b); }
REVQ_INLINE Vec larger(Vec a, Vec b) { return vmaxq_f32(a, b); }
#else
// A product and a sum, each rounded; the certificate covers that too.
REVQ_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
#if defined(__SSE__)
REVQ_INLINE Vec smaller(Vec a, Vec b) { return _mm_min_ps(a, b); }
REVQ_INLINE Vec larger(Vec a, Vec b) { return _mm_max_ps(a, b); }
#else
REVQ_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
REVQ_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif
#endif
#endif

#if REVQ_LANES != 16
REVQ_INLINE float smallest_lane(Vec a) {
  float least = a[0];
  for (int64_t i = 1; i < kFirstLanes; ++i) least = a[i] < least ? a[i] : least;
  return least;
}
#endif

REVQ_INLINE float largest_lane(Vec a) {
  float most = a[0];
  for (int64_t i = 1; i < kFirstLanes; ++i) most = a[i] > most ? a[i] : most;
  return most;
}

// Keeps a value in a register: gcc would otherwise fold its load into every use, and the load ports become the limit.
template <typename V>
REVQ_INLINE void pin(V& value) {
#if defined(__AVX__)
  asm("" : "+v"(value));
#elif defined(__SSE__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// Four numbers from each of row(0), row(4), .., side by side.
template <typename V, typename Row>
REVQ_INLINE V load_fours(Row row, int64_t j) {
  if constexpr (sizeof(V) == 16) {
    return load_as<V>(row(0) + j);
  } else {
#if REVQ_LANES == 16
    __m512 value = _mm512_castps128_ps512(_mm_loadu_ps(row(0) + j));
    value = _mm512_insertf32x4(value, _mm_loadu_ps(row(4) + j), 1);
    value = _mm512_insertf32x4(value, _mm_loadu_ps(row(8) + j), 2);
    return _mm512_insertf32x4(value, _mm_loadu_ps(row(12) + j), 3);
#elif REVQ_LANES == 8
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row(0) + j)), _mm_loadu_ps(row(4) + j), 1);
#endif
  }
}

// Four numbers, again and again.
template <typename V>
REVQ_INLINE V repeat(const float* from) {
  if constexpr (sizeof(V) == 16) {
    return load_as<V>(from);
  } else {
#if REVQ_LANES == 16
    return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
#elif REVQ_LANES == 8
    return _mm256_broadcast_ps((const __m128*)from);
#endif
  }
}

// Of every four numbers of a and b: the first two interleaved, the last two; the first two side by side, the last.
REVQ_INLINE Four zip_low(Four a, Four b) { return __builtin_shuffle(a, b, FourInts{0, 4, 1, 5}); }
REVQ_INLINE Four zip_high(Four a, Four b) { return __builtin_shuffle(a, b, FourInts{2, 6, 3, 7}); }
REVQ_INLINE Four join_low(Four a, Four b) { return __builtin_shuffle(a, b, FourInts{0, 1, 4, 5}); }
REVQ_INLINE Four join_high(Four a, Four b) { return __builtin_shuffle(a, b, FourInts{2, 3, 6, 7}); }
#if REVQ_LANES == 16
REVQ_INLINE Vec zip_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
REVQ_INLINE Vec zip_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
REVQ_INLINE Vec join_low(Vec a, Vec b) { return (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
REVQ_INLINE Vec join_high(Vec a, Vec b) { return (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
#elif REVQ_LANES == 8
REVQ_INLINE Vec zip_low(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
REVQ_INLINE Vec zip_high(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
REVQ_INLINE Vec join_low(Vec a, Vec b) { return (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
REVQ_INLINE Vec join_high(Vec a, Vec b) { return (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
#endif

// The 4 x 4 blocks of four registers, each transposed.
template <typename V>
REVQ_INLINE void transpose(V& a, V& b, V& c, V& d) {
  const V ab_low = zip_low(a, b), cd_low = zip_low(c, d), ab_high = zip_high(a, b), cd_high = zip_high(c, d);
  a = join_low(ab_low, cd_low);
  b = join_high(ab_low, cd_low);
  c = join_low(ab_high, cd_high);
  d = join_high(ab_high, cd_high);
}

}  // namespace
