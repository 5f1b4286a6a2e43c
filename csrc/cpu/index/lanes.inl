// 16 lanes in as many registers as it takes, per instruction set: what index_walk.inl is written in.
// REVQ_WALK_ISA is 0 for any processor, 1 for AVX2, 2 for AVX-512: gcc 12 defines no __AVX2__ for a pragma.

namespace {

constexpr int kWidth = REVQ_WALK_ISA == 2 ? 16 : 8;
constexpr int kParts = 16 / kWidth;
static_assert(kLeafCodes == 16 && kFanout == 16, "a leaf and a block are 16 lanes");

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
#define REVQ_INLINE inline __attribute__((always_inline))

struct Lanes {
  Floats part[kParts];
};

REVQ_INLINE Lanes load16(const float* from) {
  Lanes value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

#if REVQ_WALK_ISA == 2
REVQ_INLINE Floats spread(float value) { return (Floats)_mm512_set1_ps(value); }
REVQ_INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#elif REVQ_WALK_ISA == 1
REVQ_INLINE Floats spread(float value) { return (Floats)_mm256_set1_ps(value); }
REVQ_INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
#else
REVQ_INLINE Floats spread(float value) { return value - Floats{}; }
REVQ_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
REVQ_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// Bit i: lane i is not greater than the limit.  No lane is a NaN.
REVQ_INLINE unsigned at_most(const Lanes& lanes, float limit) {
#if REVQ_WALK_ISA == 2
  return _mm512_cmp_ps_mask((__m512)lanes.part[0], _mm512_set1_ps(limit), _CMP_LE_OQ);
#elif REVQ_WALK_ISA == 1
  const __m256 all = _mm256_set1_ps(limit);
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)lanes.part[0], all, _CMP_LE_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps((__m256)lanes.part[1], all, _CMP_LE_OQ)) << 8;
#else
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(lanes.part[i / kWidth][i % kWidth] <= limit) << i;
  return mask;
#endif
}

// The first `count` lanes, or all.
REVQ_INLINE unsigned present(int64_t count) { return count >= 16 ? 0xFFFFu : (1u << count) - 1; }

// The first lane of the smallest value among the first `count`, without a branch that data decide.
REVQ_INLINE int smallest_lane(const Lanes& lanes, int64_t count) {
#if REVQ_WALK_ISA == 2
  const __m512 all = _mm512_mask_blend_ps(present(count), _mm512_set1_ps(__builtin_inff()), (__m512)lanes.part[0]);
  const float least = _mm512_reduce_min_ps(all);
  return __builtin_ctz(_mm512_cmp_ps_mask(all, _mm512_set1_ps(least), _CMP_LE_OQ) & present(count));
#else
  float value[16];
  __builtin_memcpy(value, &lanes, sizeof value);
  float least = value[0];
  for (int64_t i = 1; i < count && i < 16; ++i) least = value[i] < least ? value[i] : least;
  return __builtin_ctz(at_most(lanes, least) & present(count));
#endif
}

// Adds the lanes of a mask: child `first` + lane, with its bound.
REVQ_INLINE void append(Waiting& to, unsigned mask, int64_t walker, int64_t first, const Lanes& bounds) {
  const uint32_t entry = static_cast<uint32_t>(walker) << kChildBits | static_cast<uint32_t>(first);
#if REVQ_WALK_ISA == 2
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i entries = _mm512_add_epi32(lane, _mm512_set1_epi32(entry));
  const int64_t size = to.size;
  _mm512_storeu_si512(to.entry + size, _mm512_maskz_compress_epi32(mask, entries));
  _mm512_storeu_ps(to.bound + size, _mm512_maskz_compress_ps(mask, (__m512)bounds.part[0]));
  to.size = size + __builtin_popcount(mask);
#else
  float value[16];
  __builtin_memcpy(value, &bounds, sizeof value);
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    to.entry[to.size] = entry + lane;
    to.bound[to.size++] = value[lane];
  }
#endif
}

// Moves what is bounded by at most `share` of its walker's best from one list to an empty one; both keep their order.
REVQ_INLINE void move_near(Waiting& from, const float* best, float share, Waiting& to) {
  int64_t kept = 0, moved = 0;
#if REVQ_WALK_ISA == 2
  static_assert(kWalkers == 32, "two registers hold the best of all walkers");
  const __m512 first = _mm512_loadu_ps(best), second = _mm512_loadu_ps(best + 16), scale = _mm512_set1_ps(share);
  for (int64_t i = 0; i < from.size; i += 16) {
    const __m512i entry = _mm512_loadu_si512(from.entry + i);
    const __m512 bound = _mm512_loadu_ps(from.bound + i);
    const __m512 limit = _mm512_permutex2var_ps(first, _mm512_srli_epi32(entry, kChildBits), second);
    const unsigned all = present(from.size - i);
    const unsigned near = _mm512_cmp_ps_mask(bound, _mm512_mul_ps(scale, limit), _CMP_LE_OQ) & all, far = all & ~near;
    _mm512_storeu_si512(to.entry + moved, _mm512_maskz_compress_epi32(near, entry));
    _mm512_storeu_si512(from.entry + kept, _mm512_maskz_compress_epi32(far, entry));
    _mm512_storeu_ps(from.bound + kept, _mm512_maskz_compress_ps(far, bound));
    moved += __builtin_popcount(near);
    kept += __builtin_popcount(far);
  }
#else
  for (int64_t i = 0; i < from.size; ++i) {  // no branch that data decide
    const uint32_t entry = from.entry[i];
    const float bound = from.bound[i];
    const bool near = bound <= share * best[entry >> kChildBits];
    to.entry[moved] = from.entry[kept] = entry;
    from.bound[kept] = bound;
    moved += near;
    kept += !near;
  }
#endif
  from.size = kept;
  to.size = moved;
}

}  // namespace
