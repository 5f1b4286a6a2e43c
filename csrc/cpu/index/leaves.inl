// Copies codes into leaves, and takes the boxes of the leaves.  16 rows are read a quad of elements at a time, as many
// rows to a register as it holds: rows r, r + 4, r + 8 and r + 12 share a register, so after a 4 x 4 transposition of its
// quads the columns come out in the order of the lanes.
namespace revq::REVQ_ISA {
namespace {

constexpr int kRowsPerRegister = kLanes / 4;

// Folds the quads of a register into one: one element of `pick` for each of its four columns.
template <typename Pick>
REVQ_INLINE void fold(const Floats& value, const Pick& pick, float* to) {
  FloatQuad quad[kRowsPerRegister];
  store(quad, value);
  for (int i = 1; i < kRowsPerRegister; ++i) quad[0] = pick(quad[0], quad[i]);
  store(to, quad[0]);
}

// Transposes 16 rows of d elements into columns of 16.  With kCorners, also the least and the greatest element of each
// column, and `not_finite`, whose bits stay 0 while all elements are finite.
template <bool kPastCaches, bool kCorners>
REVQ_INLINE void transpose_rows(const float* const* row, int64_t d, float* columns, float* low, float* high,
                                Bits& not_finite) {
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    Floats least{}, most{};
    for (int part = 0; part < 4; part += kRowsPerRegister) {
      Floats w[4];
      for (int r = 0; r < 4; ++r) {
        w[r] = load_quads<Floats>([&](int64_t lane) { return row[4 * part + r + lane]; }, j);
        if (!kCorners) continue;
        least = part + r == 0 ? w[r] : smaller(least, w[r]);
        most = part + r == 0 ? w[r] : larger(most, w[r]);
        not_finite |= (Bits)(w[r] - w[r]);  // +0, or a NaN for infinities and NaNs
      }
      transpose(w[0], w[1], w[2], w[3]);
      for (int i = 0; i < 4; ++i) {
        float* column = columns + (j + i) * 16 + 4 * part;
        if constexpr (kPastCaches) {
          store_past_caches(column, w[i]);
        } else {
          store(column, w[i]);
        }
      }
    }
    if (!kCorners) continue;
    fold(least, [](FloatQuad a, FloatQuad b) { return a < b ? a : b; }, low + j);
    fold(most, [](FloatQuad a, FloatQuad b) { return a > b ? a : b; }, high + j);
  }
  for (; j < d; ++j) {
    for (int64_t lane = 0; lane < 16; ++lane) {
      const float value = row[lane][j];
      columns[j * 16 + lane] = value;
      if (!kCorners) continue;
      low[j] = lane == 0 || value < low[j] ? value : low[j];
      high[j] = lane == 0 || value > high[j] ? value : high[j];
      const float difference = value - value;
      uint32_t bits;
      __builtin_memcpy(&bits, &difference, sizeof bits);
      not_finite[0] |= bits;
    }
  }
}

// The 16 rows of a leaf's codes; false where an id is not a code's.
template <int D>
REVQ_INLINE bool find_rows(const float* codes, const TreeLayout& layout, const TreeGroup& group, int64_t leaf,
                           const float** row) {
  const int64_t d = D > 0 ? D : layout.d;
  const int32_t* ids = group.ids + leaf * 16;
  const int64_t ahead = leaf + kLeavesAhead < layout.leaves ? leaf + kLeavesAhead : layout.leaves - 1;
  const int32_t* later = group.ids + ahead * 16;
  Ints wrong{};  // an id below 0 or above the last sets a sign bit
  for (int part = 0; part < kParts; ++part) {
    const Ints some = load<Ints>(ids + part * kLanes);
    wrong |= some | (static_cast<int32_t>(layout.codes - 1) - some);
  }
  if (any_negative(wrong)) return false;
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane) {
    for (int64_t j = 0; j < d; j += 16) __builtin_prefetch(codes + later[lane] * d + j);
    row[lane] = codes + ids[lane] * d;
  }
  return true;
}

// Fills the leaves of one block.  The corners of its leaves form rows of `pitch` floats, which the same transposition
// makes a block of boxes.  D is the code dimension where the compiler knows it, else 0.
template <int D, bool kPastCaches>
REVQ_INLINE uint32_t fill_block(const float* codes, const TreeLayout& layout, const TreeGroup& group, int64_t block,
                                float* corners) {
  const int64_t d = D > 0 ? D : layout.d, pitch = round_up(d, 4), first = block * 16;
  const int64_t leaves = layout.leaves - first < 16 ? layout.leaves - first : 16;
  float *low = corners, *high = corners + 16 * pitch;
  const float *row[16], *lows[16], *highs[16];
  Bits not_finite{};
  for (int64_t leaf = 0; leaf < 16; ++leaf) {
    lows[leaf] = low + leaf * pitch;
    highs[leaf] = high + leaf * pitch;
  }
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    if (!find_rows<D>(codes, layout, group, first + leaf, row)) return kWrongIds;
    float* panel = group.panels + (first + leaf) * d * 16;
    transpose_rows<kPastCaches, true>(row, d, panel, low + leaf * pitch, high + leaf * pitch, not_finite);
  }
  if constexpr (kPastCaches) order_stores();
  for (int64_t i = leaves * pitch; i < 16 * pitch; ++i) low[i] = high[i] = 0.0f;
  float* box = group.boxes + (layout.first_block[0] + block) * 2 * d * 16;
  transpose_rows<false, false>(lows, d, box, nullptr, nullptr, not_finite);
  transpose_rows<false, false>(highs, d, box + d * 16, nullptr, nullptr, not_finite);
  if (layout.levels > 1) {  // the box around them all
    float* above = group.boxes + (layout.first_block[1] + block / 16) * 2 * d * 16 + block % 16;
    for (int64_t j = 0; j < pitch; j += 4) {
      FloatQuad least = load<FloatQuad>(low + j), most = load<FloatQuad>(high + j);
      for (int64_t leaf = 1; leaf < leaves; ++leaf) {
        const FloatQuad other_low = load<FloatQuad>(low + leaf * pitch + j);
        const FloatQuad other_high = load<FloatQuad>(high + leaf * pitch + j);
        least = other_low < least ? other_low : least;
        most = other_high > most ? other_high : most;
      }
      for (int64_t i = j; i < d && i < j + 4; ++i) {
        above[i * 16] = least[i - j];
        above[(d + i) * 16] = most[i - j];
      }
    }
  }
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= not_finite[i];
  return bits != 0 ? kNotFinite : 0;
}

uint32_t fill(const float* codes, const TreeLayout& layout, const TreeGroup& group, int64_t block, float* corners,
              bool past_caches) {
  const bool aligned = reinterpret_cast<uintptr_t>(group.panels) % sizeof(Floats) == 0;
  if (layout.d == 8 && past_caches && aligned) return fill_block<8, true>(codes, layout, group, block, corners);
  if (past_caches && aligned) return fill_block<0, true>(codes, layout, group, block, corners);
  switch (layout.d) {
    case 4: return fill_block<4, false>(codes, layout, group, block, corners);
    case 8: return fill_block<8, false>(codes, layout, group, block, corners);
    default: return fill_block<0, false>(codes, layout, group, block, corners);
  }
}

}  // namespace
}  // namespace revq::REVQ_ISA
