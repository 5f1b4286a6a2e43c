// What follows the scores: finding the cells that count, and D of the contract for their codes.
namespace {

float smallest(const float* minima, int64_t count) {
  Vec least[4];
  for (Vec& l : least) l = everywhere(kExcluded);
  int64_t i = 0;
  for (; i + 4 * kFirstLanes <= count; i += 4 * kFirstLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) least[k] = smaller(least[k], load_as<Vec>(minima + i + k * kFirstLanes));
  }
  for (; i < count; i += kFirstLanes) least[0] = smaller(least[0], load_as<Vec>(minima + i));
  return smallest_lane(smaller(smaller(least[0], least[1]), smaller(least[2], least[3])));
}

int64_t at_most(const float* minima, int64_t count, float limit, int32_t* cells, int64_t capacity) {
  int64_t found = 0;
  const Vec limits = everywhere(limit);
  for (int64_t begin = 0; begin < count; begin += 4 * kFirstLanes) {
    if (begin + 4 * kFirstLanes <= count) {  // four vectors at a time: nearly none holds a candidate
      const float* four = minima + begin;
      const Vec low = smaller(load_as<Vec>(four), load_as<Vec>(four + kFirstLanes));
      const Vec high = smaller(load_as<Vec>(four + 2 * kFirstLanes), load_as<Vec>(four + 3 * kFirstLanes));
      if (lanes_at_most(smaller(low, high), limits) == 0) continue;
    }
    const int64_t end = begin + 4 * kFirstLanes < count ? begin + 4 * kFirstLanes : count;
    for (int64_t i = begin; i < end; i += kFirstLanes) {
      for (uint32_t mask = lanes_at_most(load_as<Vec>(minima + i), limits); mask != 0; mask &= mask - 1) {
        if (found == capacity) return found + 1;
        cells[found++] = static_cast<int32_t>(i + __builtin_ctz(mask));
      }
    }
  }
  return found;
}

// D of the contract for a pair per lane: every subtraction, product and sum rounded on its own, sums in index order.
void distances(const float* const* x, const float* const* rows, int64_t d, float* out) {
  Vec total = everywhere(0.0f);  // 0 + square is exact
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    Vec r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec query = load_fours<Vec>([&](int64_t lane) { return x[lane + i]; }, j);
      const Vec difference = query - load_fours<Vec>([&](int64_t lane) { return rows[lane + i]; }, j);
      r[i] = difference * difference;
    }
    transpose(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total = total + r[i];
  }
  for (; j < d; ++j) {
    float column[kFirstLanes];
    for (int64_t i = 0; i < kFirstLanes; ++i) column[i] = x[i][j] - rows[i][j];
    const Vec difference = load_as<Vec>(column);
    total = total + difference * difference;
  }
  store_as(out, total);
}

}  // namespace

extern const FirstPass first_pass = {kFirstLanes, pack_codes, pack_plain, pack_queries,
                                     score,       smallest,   at_most,    distances};
