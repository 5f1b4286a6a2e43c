// Rows of codes into leaves, and the comparison of the two, compiled once per instruction set beside the walk.
// 16 rows are read a quad of numbers at a time, as many rows to a register as it holds, and turned by 4 x 4 in each of
// its quads: rows r, r + 4, r + 8 and r + 12 share a register, so the columns come out in the order of the lanes.

namespace {

// Leaves whose rows are fetched before they are read: their order is no processor's guess.
constexpr int64_t kLeavesAhead = 10;

typedef float Quad __attribute__((vector_size(16)));

REVQ_INLINE Quad load4(const float* from) {
  Quad value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

#if REVQ_WALK_ISA > 0
REVQ_INLINE __m256 two(const float* a, const float* b) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
}
#endif

#if REVQ_WALK_ISA == 2
typedef __m512 Wide;
REVQ_INLINE Wide wide(const float* const* row, int64_t j) {
  const __m256 first = two(row[0] + j, row[4] + j), last = two(row[8] + j, row[12] + j);
  return _mm512_insertf32x8(_mm512_castps256_ps512(first), last, 1);
}
#define REVQ_WIDE(name, ...) _mm512_##name(__VA_ARGS__)
#elif REVQ_WALK_ISA == 1
typedef __m256 Wide;
REVQ_INLINE Wide wide(const float* const* row, int64_t j) {
  return two(row[0] + j, row[4] + j);
}
#define REVQ_WIDE(name, ...) _mm256_##name(__VA_ARGS__)
#else
typedef Quad Wide;
REVQ_INLINE Wide wide(const float* const* row, int64_t j) { return load4(row[0] + j); }
#endif

constexpr int kWideRows = sizeof(Wide) / 16;
typedef uint32_t WideBits __attribute__((vector_size(sizeof(Wide))));

REVQ_INLINE void turn(Wide (&w)[4]) {
#ifdef REVQ_WIDE
  const Wide a = REVQ_WIDE(unpacklo_ps, w[0], w[1]), b = REVQ_WIDE(unpackhi_ps, w[0], w[1]);
  const Wide c = REVQ_WIDE(unpacklo_ps, w[2], w[3]), d = REVQ_WIDE(unpackhi_ps, w[2], w[3]);
  w[0] = REVQ_WIDE(shuffle_ps, a, c, 0x44);
  w[1] = REVQ_WIDE(shuffle_ps, a, c, 0xEE);
  w[2] = REVQ_WIDE(shuffle_ps, b, d, 0x44);
  w[3] = REVQ_WIDE(shuffle_ps, b, d, 0xEE);
#else
  constexpr WideBits kLow{0, 4, 1, 5}, kHigh{2, 6, 3, 7};
  const Wide a = __builtin_shuffle(w[0], w[1], kLow), b = __builtin_shuffle(w[0], w[1], kHigh);
  const Wide c = __builtin_shuffle(w[2], w[3], kLow), d = __builtin_shuffle(w[2], w[3], kHigh);
  w[0] = __builtin_shuffle(a, c, WideBits{0, 1, 4, 5});
  w[1] = __builtin_shuffle(a, c, WideBits{2, 3, 6, 7});
  w[2] = __builtin_shuffle(b, d, WideBits{0, 1, 4, 5});
  w[3] = __builtin_shuffle(b, d, WideBits{2, 3, 6, 7});
#endif
}

REVQ_INLINE Wide lesser(Wide a, Wide b) {
#ifdef REVQ_WIDE
  return REVQ_WIDE(min_ps, a, b);
#else
  return a < b ? a : b;
#endif
}

REVQ_INLINE Wide greater(Wide a, Wide b) {
#ifdef REVQ_WIDE
  return REVQ_WIDE(max_ps, a, b);
#else
  return a > b ? a : b;
#endif
}

// One number of `pick` for each of a register's four columns.
template <typename Pick>
REVQ_INLINE void fold(const Wide& wide, const Pick& pick, float* to) {
  Quad quad[kWideRows];
  __builtin_memcpy(quad, &wide, sizeof wide);
  for (int i = 1; i < kWideRows; ++i) quad[0] = pick(quad[0], quad[i]);
  __builtin_memcpy(to, quad, sizeof quad[0]);
}

// Not 0 where a lane is negative.
REVQ_INLINE int any_negative(Ints lanes) {
#if REVQ_WALK_ISA == 2
  return _mm512_movepi32_mask((__m512i)lanes);
#elif REVQ_WALK_ISA == 1
  return _mm256_movemask_ps((__m256)lanes);
#else
  int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= lanes[i];
  return all < 0;
#endif
}

struct Turned {
  WideBits special{};   // stays 0 while all numbers are finite
  uint32_t changed = 0;  // stays 0 while the columns hold what was there
};

// What is done with columns: written, written past the caches, or compared with what is there.
enum class To { kCache, kMemory, kCompare };

template <To kTo>
REVQ_INLINE void write(float* column, const Wide& values) {
#if REVQ_WALK_ISA == 2
  if constexpr (kTo == To::kMemory) return _mm512_stream_ps(column, values);
#elif REVQ_WALK_ISA == 1
  if constexpr (kTo == To::kMemory) return _mm256_stream_ps(column, values);
#endif
  __builtin_memcpy(column, &values, sizeof values);
}

// 16 rows of d numbers into columns of 16, or a comparison with what is there; kCorners: the ends of each column.
template <To kTo, bool kCorners>
REVQ_INLINE void turn_rows(const float* const* row, int64_t d, float* columns, float* low, float* high,
                           Turned& turned) {
  WideBits changed{};
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    Wide least{}, most{};
    for (int part = 0; part < 4; part += kWideRows) {
      Wide w[4];
      for (int r = 0; r < 4; ++r) {
        w[r] = wide(row + 4 * part + r, j);
        if (!kCorners) continue;
        least = part + r == 0 ? w[r] : lesser(least, w[r]);
        most = part + r == 0 ? w[r] : greater(most, w[r]);
        turned.special |= (WideBits)(w[r] - w[r]);  // +0, or a NaN for infinities and NaNs
      }
      turn(w);
      for (int i = 0; i < 4; ++i) {
        float* column = columns + (j + i) * 16 + 4 * part;
        if constexpr (kTo != To::kCompare) {
          write<kTo>(column, w[i]);
        } else {
          WideBits old;
          __builtin_memcpy(&old, column, sizeof old);
          changed |= (WideBits)w[i] ^ old;
        }
      }
    }
    if (!kCorners) continue;
    fold(least, [](Quad a, Quad b) { return a < b ? a : b; }, low + j);
    fold(most, [](Quad a, Quad b) { return a > b ? a : b; }, high + j);
  }
  for (int i = 0; i < 4 * kWideRows && kTo == To::kCompare; ++i) turned.changed |= changed[i];
  for (; j < d; ++j) {
    for (int64_t lane = 0; lane < 16; ++lane) {
      const float value = row[lane][j];
      uint32_t bits, old;
      __builtin_memcpy(&bits, &value, sizeof bits);
      if constexpr (kTo != To::kCompare) {
        columns[j * 16 + lane] = value;
      } else {
        __builtin_memcpy(&old, columns + j * 16 + lane, sizeof old);
        turned.changed |= bits ^ old;
      }
      if (!kCorners) continue;
      low[j] = lane == 0 || value < low[j] ? value : low[j];
      high[j] = lane == 0 || value > high[j] ? value : high[j];
      const float special = value - value;
      __builtin_memcpy(&bits, &special, sizeof bits);
      turned.special[0] |= bits;
    }
  }
}

// The 16 rows of a leaf's codes; false where a number is not a code's.
template <int D>  // the code dimension, or 0 for any
REVQ_INLINE bool find_rows(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t leaf,
                           const float** row) {
  const int64_t d = D > 0 ? D : layout.d;
  const int32_t* ids = group.ids + leaf * 16;
  const int64_t ahead = leaf + kLeavesAhead < layout.leaves ? leaf + kLeavesAhead : layout.leaves - 1;
  const int32_t* later = group.ids + ahead * 16;
  Ints wrong{};  // a sign bit is set by a number below 0 or above the last
  for (int part = 0; part < kParts; ++part) {
    Ints some;
    __builtin_memcpy(&some, ids + part * kWidth, sizeof some);
    wrong |= some | (static_cast<int32_t>(layout.codes - 1) - some);
  }
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane) {
    for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(codes + later[lane] * d + j);
    row[lane] = codes + ids[lane] * d;
  }
  return any_negative(wrong) == 0;
}

// The corners of a block's leaves stand in rows of `pitch` numbers, which the same turn makes a block of boxes.
template <int D, To kTo>
REVQ_INLINE uint32_t fill(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block,
                          float* corners) {
  const int64_t d = D > 0 ? D : layout.d, pitch = (d + 3) / 4 * 4, first = block * 16;
  const int64_t leaves = layout.leaves - first < 16 ? layout.leaves - first : 16;
  float *low = corners, *high = corners + 16 * pitch;
  const float *row[16], *lows[16], *highs[16];
  Turned turned;
  for (int64_t leaf = 0; leaf < 16; ++leaf) {
    lows[leaf] = low + leaf * pitch;
    highs[leaf] = high + leaf * pitch;
  }
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    if (!find_rows<D>(codes, layout, group, first + leaf, row)) return kWrongIds;
    float* panel = group.panels + (first + leaf) * d * 16;
    turn_rows<kTo, true>(row, d, panel, low + leaf * pitch, high + leaf * pitch, turned);
  }
#if REVQ_WALK_ISA > 0
  if constexpr (kTo == To::kMemory) _mm_sfence();  // such stores keep no order with those that hand the work over
#endif
  for (int64_t i = leaves * pitch; i < 16 * pitch; ++i) low[i] = high[i] = 0.0f;
  float* box = group.boxes + (layout.first_block[0] + block) * 2 * d * 16;
  turn_rows<To::kCache, false>(lows, d, box, nullptr, nullptr, turned);
  turn_rows<To::kCache, false>(highs, d, box + d * 16, nullptr, nullptr, turned);
  if (layout.levels > 1) {  // the box around them all
    float* above = group.boxes + (layout.first_block[1] + block / 16) * 2 * d * 16 + block % 16;
    for (int64_t j = 0; j < pitch; j += 4) {
      Quad least = load4(low + j), most = load4(high + j);
      for (int64_t leaf = 1; leaf < leaves; ++leaf) {
        const Quad other = load4(low + leaf * pitch + j), above_it = load4(high + leaf * pitch + j);
        least = other < least ? other : least;
        most = above_it > most ? above_it : most;
      }
      for (int64_t i = j; i < d && i < j + 4; ++i) {
        above[i * 16] = least[i - j];
        above[(d + i) * 16] = most[i - j];
      }
    }
  }
  uint32_t special = 0;
  for (int i = 0; i < 4 * kWideRows; ++i) special |= turned.special[i];
  return special != 0 ? kNotFinite : 0;
}

template <int D>
REVQ_INLINE uint32_t compare(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block) {
  const int64_t d = D > 0 ? D : layout.d, end = block * 16 + 16 < layout.leaves ? block * 16 + 16 : layout.leaves;
  const float* row[16];
  Turned turned;
  for (int64_t leaf = block * 16; leaf < end; ++leaf) {
    if (!find_rows<D>(codes, layout, group, leaf, row)) return kWrongIds;
    turn_rows<To::kCompare, false>(row, d, group.panels + leaf * d * 16, nullptr, nullptr, turned);
  }
  return turned.changed != 0 ? kChanged : 0;
}

}  // namespace

uint32_t index_fill(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block,
                    float* corners, bool stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(group.panels) % sizeof(Wide) == 0;
  if (layout.d == 8 && stream && aligned) return fill<8, To::kMemory>(codes, layout, group, block, corners);
  if (stream && aligned) return fill<0, To::kMemory>(codes, layout, group, block, corners);
  switch (layout.d) {
    case 4: return fill<4, To::kCache>(codes, layout, group, block, corners);
    case 8: return fill<8, To::kCache>(codes, layout, group, block, corners);
    default: return fill<0, To::kCache>(codes, layout, group, block, corners);
  }
}

uint32_t index_compare(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block) {
  switch (layout.d) {
    case 4: return compare<4>(codes, layout, group, block);
    case 8: return compare<8>(codes, layout, group, block);
    default: return compare<0>(codes, layout, group, block);
  }
}

#undef REVQ_WIDE
