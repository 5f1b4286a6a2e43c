// The SIMD vocabulary: every vector type and vector operation that the kernels use, for one instruction set.
//
// A unit of cpu/clones/ defines REVQ_ISA, its namespace, and REVQ_LANES, the floats of a register: 16 for AVX-512, 8 for
// AVX2, 4 for SSE, NEON and any other processor.  The compiler's own macros do not tell: gcc 12 defines no __AVX2__ for
// the pragma that selects a target.  Types are the vector extensions of gcc and clang, whose operators need no
// intrinsic; -ffp-contract=off keeps both compilers from fusing them.  A fused multiply-add is `multiply_add` only.

#ifdef __FAST_MATH__
#error "-ffast-math changes distances: the exactness contract forbids it"
#endif

#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define REVQ_INLINE inline __attribute__((always_inline))

namespace revq::REVQ_ISA {
namespace {

constexpr int64_t kLanes = REVQ_LANES;
typedef float Floats __attribute__((vector_size(4 * REVQ_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * REVQ_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * REVQ_LANES)));
typedef int64_t Longs __attribute__((vector_size(4 * REVQ_LANES)));
// Four lanes, on every instruction set.
typedef float FloatQuad __attribute__((vector_size(16)));
typedef int32_t IntQuad __attribute__((vector_size(16)));
typedef double DoubleQuad __attribute__((vector_size(32)));

// Memory needs no alignment.  An array of floats may hold int32 lanes.
template <typename V>
REVQ_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename V>
REVQ_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
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

// ---- One register of floats: broadcast, multiply_add, smaller, larger, masks and reductions.

#if REVQ_LANES == 16

REVQ_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }
REVQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
REVQ_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
REVQ_INLINE Ints smaller(Ints a, Ints b) { return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b); }
REVQ_INLINE uint32_t lanes_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
REVQ_INLINE float smallest_value(Floats a) { return _mm512_reduce_min_ps(a); }
REVQ_INLINE bool any_negative(Ints a) { return _mm512_movepi32_mask((__m512i)a) != 0; }

#elif REVQ_LANES == 8

REVQ_INLINE Floats broadcast(float value) { return _mm256_set1_ps(value); }
REVQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
REVQ_INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
REVQ_INLINE Ints smaller(Ints a, Ints b) { return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }
REVQ_INLINE uint32_t lanes_at_most(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
}
REVQ_INLINE bool any_negative(Ints a) { return _mm256_movemask_ps((__m256)a) != 0; }

#else

REVQ_INLINE Floats broadcast(float value) { return Floats{value, value, value, value}; }
REVQ_INLINE Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

#if defined(__SSE__)
// A product and a sum, each rounded: the certificate covers that too.
REVQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return _mm_min_ps(a, b); }
REVQ_INLINE Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
REVQ_INLINE uint32_t lanes_at_most(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmple_ps(a, b)));
}
REVQ_INLINE bool any_negative(Ints a) { return _mm_movemask_ps((__m128)a) != 0; }
#else
#if defined(__ARM_NEON) && defined(__aarch64__)
REVQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)vfmaq_f32(c, a, b); }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return (Floats)vminq_f32(a, b); }
REVQ_INLINE Floats larger(Floats a, Floats b) { return (Floats)vmaxq_f32(a, b); }
#else
REVQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
REVQ_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif
REVQ_INLINE uint32_t lanes_at_most(Floats a, Floats b) {
  const Ints mask = a <= b;
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
}
REVQ_INLINE bool any_negative(Ints a) { return (a[0] | a[1] | a[2] | a[3]) < 0; }
#endif

#endif

#if REVQ_LANES != 16
REVQ_INLINE float smallest_value(Floats a) {
  float least = a[0];
  for (int64_t i = 1; i < kLanes; ++i) least = a[i] < least ? a[i] : least;
  return least;
}
#endif

REVQ_INLINE float largest_value(Floats a) {
  float most = a[0];
  for (int64_t i = 1; i < kLanes; ++i) most = a[i] > most ? a[i] : most;
  return most;
}

// The bits of a distance, which is never negative, in the order of the contract: -1 for a NaN, before every number.
// And a comparison that selects lanes.  AVX-512 is written out, for gcc compares twice otherwise.
#if REVQ_LANES == 16
typedef __mmask16 LaneMask;
REVQ_INLINE Ints key_bits(Floats distance) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(distance, distance, _CMP_UNORD_Q);
  return (Ints)_mm512_mask_mov_epi32((__m512i)distance, is_nan, _mm512_set1_epi32(-1));
}
REVQ_INLINE LaneMask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
REVQ_INLINE Ints select(LaneMask mask, int32_t value, Ints otherwise) {
  return (Ints)_mm512_mask_mov_epi32((__m512i)otherwise, mask, _mm512_set1_epi32(value));
}
#else
typedef Ints LaneMask;
REVQ_INLINE Ints key_bits(Floats distance) { return (Ints)distance | (Ints)(distance != distance); }
REVQ_INLINE LaneMask less(Ints a, Ints b) { return a < b; }
REVQ_INLINE Ints select(LaneMask mask, int32_t value, Ints otherwise) { return mask ? Ints{} + value : otherwise; }
#endif

// ---- Lanes that change places.

// Lane i becomes lane i ^ kStep, a power of two.
template <int kStep, typename V, int... kLane>
REVQ_INLINE V exchange(V value, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(value, value, (kLane ^ kStep)...);
}
template <int kStep, typename V>
REVQ_INLINE V exchange(V value) {
  return exchange<kStep>(value, std::make_integer_sequence<int, sizeof(V) / sizeof(value[0])>());
}

// The smallest of every kGroup neighboring lanes, in all of them.
template <int kGroup, int kStep = 1>
REVQ_INLINE Floats smallest_of_groups(Floats value) {
  if constexpr (kStep < kGroup) {
    return smallest_of_groups<kGroup, 2 * kStep>(smaller(value, exchange<kStep>(value)));
  } else {
    return value;
  }
}

REVQ_INLINE Longs smaller(Longs a, Longs b) { return a < b ? a : b; }

template <int kStep = kLanes / 4>
REVQ_INLINE int64_t smallest_value(Longs value) {
  if constexpr (kStep > 0) {
    return smallest_value<kStep / 2>(smaller(value, exchange<kStep>(value)));
  } else {
    return value[0];
  }
}

// 64-bit lanes whose words are those of two registers: of the first half of their lanes, and of the second.
template <int... kLane>
REVQ_INLINE void join_words(Ints upper, Ints lower, Longs& first, Longs& second, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kLanes / 2, kOther = kLanes;
  first = (Longs)__builtin_shufflevector(lower, upper, (kLane / 2 + kLane % 2 * kOther)...);
  second = (Longs)__builtin_shufflevector(lower, upper, (kLane / 2 + kHalf + kLane % 2 * kOther)...);
}

// Of every four lanes of a and b: the first two interleaved, the last two; the first two side by side, the last.
REVQ_INLINE FloatQuad zip_low(FloatQuad a, FloatQuad b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
REVQ_INLINE FloatQuad zip_high(FloatQuad a, FloatQuad b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
REVQ_INLINE FloatQuad join_low(FloatQuad a, FloatQuad b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
REVQ_INLINE FloatQuad join_high(FloatQuad a, FloatQuad b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
#if REVQ_LANES == 16
REVQ_INLINE Floats zip_low(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
REVQ_INLINE Floats zip_high(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
REVQ_INLINE Floats join_low(Floats a, Floats b) { return (Floats)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
REVQ_INLINE Floats join_high(Floats a, Floats b) { return (Floats)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
#elif REVQ_LANES == 8
REVQ_INLINE Floats zip_low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
REVQ_INLINE Floats zip_high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
REVQ_INLINE Floats join_low(Floats a, Floats b) { return (Floats)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
REVQ_INLINE Floats join_high(Floats a, Floats b) { return (Floats)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
#endif

// Transposes the 4 x 4 blocks of four registers, each for itself.
template <typename V>
REVQ_INLINE void transpose(V& a, V& b, V& c, V& d) {
  const V ab_low = zip_low(a, b), cd_low = zip_low(c, d), ab_high = zip_high(a, b), cd_high = zip_high(c, d);
  a = join_low(ab_low, cd_low);
  b = join_high(ab_low, cd_low);
  c = join_low(ab_high, cd_high);
  d = join_high(ab_high, cd_high);
}

// Elements j to j + 3 of row(0), row(4), .., side by side: with `transpose`, of row(0) to row(kLanes - 1), in order.
template <typename V, typename Row>
REVQ_INLINE V load_quads(const Row& row, int64_t j) {
  if constexpr (sizeof(V) == 16) {
    return load<V>(row(0) + j);
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

// Four elements, in every quad of a register.
template <typename V>
REVQ_INLINE V repeat_quad(const float* from) {
  if constexpr (sizeof(V) == 16) {
    return load<V>(from);
  } else {
#if REVQ_LANES == 16
    return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
#elif REVQ_LANES == 8
    return _mm256_broadcast_ps((const __m128*)from);
#endif
  }
}

// ---- Stores past the caches, to memory aligned to a register.  They keep no order with other stores, such as one that
// tells another thread of them, before `order_stores`.
#if REVQ_LANES == 16
REVQ_INLINE void store_past_caches(float* to, Floats value) { _mm512_stream_ps(to, value); }
#elif REVQ_LANES == 8
REVQ_INLINE void store_past_caches(float* to, Floats value) { _mm256_stream_ps(to, value); }
#else
REVQ_INLINE void store_past_caches(float* to, Floats value) { store(to, value); }
#endif
REVQ_INLINE void order_stores() {
#if REVQ_LANES != 4
  _mm_sfence();
#endif
}

// ---- Pairs of int16 in int32 lanes.  add_products multiplies both and adds the products to a sum: one instruction
// with VNNI, two without.

#if REVQ_INT16
#if REVQ_LANES == 16
REVQ_INLINE Ints add_products(Ints sum, Ints a, Ints b) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
REVQ_INLINE Ints nearest_int(Floats value) { return (Ints)_mm512_cvtps_epi32(value); }
#else
REVQ_INLINE Ints add_products(Ints sum, Ints a, Ints b) {
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
REVQ_INLINE Ints nearest_int(Floats value) { return (Ints)_mm256_cvtps_epi32(value); }
#endif
REVQ_INLINE IntQuad add_products(IntQuad sum, IntQuad a, IntQuad b) {
  return sum + (IntQuad)_mm_madd_epi16((__m128i)a, (__m128i)b);
}
REVQ_INLINE IntQuad nearest_int(FloatQuad value) { return (IntQuad)_mm_cvtps_epi32(value); }

template <typename W>
REVQ_INLINE W pair_of_int16(W low, W high) {
  return (low & 0xFFFF) | (high << 16);
}
#endif

// ---- 16 lanes, in as many registers as it takes: a leaf of the tree, or the boxes of a block.

constexpr int kParts = 16 / kLanes;

struct Lanes16 {
  Floats part[kParts];
  REVQ_INLINE float operator[](int lane) const { return part[lane / kLanes][lane % kLanes]; }
};

// A register at a time: gcc 12 copies the structure through the stack, in pieces.
REVQ_INLINE Lanes16 load16(const float* from) {
  Lanes16 value;
  for (int h = 0; h < kParts; ++h) value.part[h] = load<Floats>(from + h * kLanes);
  return value;
}
REVQ_INLINE void store16(float* to, const Lanes16& value) {
  for (int h = 0; h < kParts; ++h) store(to + h * kLanes, value.part[h]);
}

// A mask of the first `count` lanes, or of all.
REVQ_INLINE uint32_t first_lanes(int64_t count) { return count >= 16 ? 0xFFFFu : (1u << count) - 1; }

// Bit i: lane i is not greater than the limit.  No lane is a NaN.
REVQ_INLINE uint32_t lanes_at_most(const Lanes16& lanes, float limit) {
  const Floats limits = broadcast(limit);
  uint32_t mask = 0;
  for (int h = 0; h < kParts; ++h) mask |= lanes_at_most(lanes.part[h], limits) << (h * kLanes);
  return mask;
}

// The first lane of the smallest value among the first `count`, without a branch that depends on data.  With NaNs it may be
// any of these lanes, but none beyond them, because callers use it as an address.
REVQ_INLINE int smallest_lane(const Lanes16& lanes, int64_t count) {
  const uint32_t mask = first_lanes(count), last = mask ^ mask >> 1;  // the answer if no value is the least
#if REVQ_LANES == 16
  const __m512 values = _mm512_mask_blend_ps(mask, _mm512_set1_ps(__builtin_inff()), (__m512)lanes.part[0]);
  const float least = _mm512_reduce_min_ps(values);
  return __builtin_ctz((_mm512_cmp_ps_mask(values, _mm512_set1_ps(least), _CMP_LE_OQ) & mask) | last);
#else
  float value[16];
  store16(value, lanes);
  float least = value[0];
  for (int64_t i = 1; i < count && i < 16; ++i) least = value[i] < least ? value[i] : least;
  return __builtin_ctz((lanes_at_most(lanes, least) & mask) | last);
#endif
}

// AVX-512 alone: the lanes of a mask one behind the other (a whole register is written), and a table of 32 floats.
#if REVQ_LANES == 16
REVQ_INLINE void compress_store(float* to, uint32_t mask, Floats value) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask, value));
}
REVQ_INLINE void compress_store(uint32_t* to, uint32_t mask, Bits value) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, (__m512i)value));
}
REVQ_INLINE Floats look_up(Floats first, Floats second, Bits place) {
  return _mm512_permutex2var_ps(first, (__m512i)place, second);
}
#endif

}  // namespace
}  // namespace revq::REVQ_ISA
