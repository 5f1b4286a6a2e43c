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
  constexpr int64_t kGroup = 4 * kFirstLanes;
  const auto report = [&](uint64_t mask, int64_t first) {
    for (; mask != 0; mask &= mask - 1) {
      if (found == capacity) return false;
      cells[found++] = static_cast<int32_t>(first + __builtin_ctzll(mask));
    }
    return true;
  };
  int64_t first = 0;
  // Nearly every query has one candidate.  So a bit per group, then the groups that have one: both loops take as many
  // turns for one query as for the next, which a processor predicts; where a candidate stands, it could not.
  while (first + kGroup <= count) {
    const int64_t groups = (count - first) / kGroup < 64 ? (count - first) / kGroup : 64;
    uint64_t some = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const float* four = minima + first + g * kGroup;
      const Vec low = smaller(load_as<Vec>(four), load_as<Vec>(four + kFirstLanes));
      const Vec high = smaller(load_as<Vec>(four + 2 * kFirstLanes), load_as<Vec>(four + 3 * kFirstLanes));
      some |= uint64_t{lanes_at_most(smaller(low, high), limits) != 0} << g;
    }
    for (; some != 0; some &= some - 1) {
      const int64_t begin = first + __builtin_ctzll(some) * kGroup;
      uint64_t mask = 0;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        mask |= uint64_t{lanes_at_most(load_as<Vec>(minima + begin + i * kFirstLanes), limits)} << (i * kFirstLanes);
      }
      if (!report(mask, begin)) return found + 1;
    }
    first += groups * kGroup;
  }
  for (; first < count; first += kFirstLanes) {
    if (!report(lanes_at_most(load_as<Vec>(minima + first), limits), first)) return found + 1;
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

// D of the contract of one query to the rows row(0), row(1), ..
template <int D, typename Row>
REVQ_INLINE Vec distances_to(const float* x, const Row& row, int64_t d) {
  if constexpr (D > 0) d = D;
  Vec total = everywhere(0.0f);
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    const Vec query = repeat<Vec>(x + j);
    Vec r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec difference = query - load_fours<Vec>([&](int64_t lane) { return row(lane + i); }, j);
      r[i] = difference * difference;
    }
    transpose(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total = total + r[i];
  }
  for (; j < d; ++j) {
    float column[kFirstLanes];
    for (int64_t i = 0; i < kFirstLanes; ++i) column[i] = row(i)[j];
    const Vec difference = everywhere(x[j]) - load_as<Vec>(column);
    total = total + difference * difference;
  }
  return total;
}

// The key of the nearest of the rows, numbered from 0; no distance is a NaN.  Two registers of distances at a time.
template <int D>
int64_t nearest_of(const float* x, CodeRows codes, int64_t d) {
  int64_t best = INT64_MAX;
  for (int64_t first = 0; first < codes.count; first += 2 * kFirstLanes) {
    const float* base = codes.rows + first * codes.stride;
    const int64_t left = codes.count - first;
    Vec low, high;
    if (left >= 2 * kFirstLanes) {
      low = distances_to<D>(x, Strided(base, codes.stride), d);
      high = distances_to<D>(x, Strided(base + kFirstLanes * codes.stride, codes.stride), d);
    } else if (left == kFirstLanes) {
      low = high = distances_to<D>(x, Strided(base, codes.stride), d);
    } else {  // places past the last code repeat it: a higher number, which never wins
      const auto clamped = [&](int64_t i) { return base + (i < left ? i : left - 1) * codes.stride; };
      low = distances_to<D>(x, clamped, d);
      high = left < kFirstLanes ? low : distances_to<D>(x, [&](int64_t i) { return clamped(kFirstLanes + i); }, d);
    }
    const float least = smallest_lane(smaller(low, high));
    const Vec all = everywhere(least);
    const uint32_t where = lanes_at_most(low, all) | lanes_at_most(high, all) << kFirstLanes;
    const int64_t key = int64_t{std::bit_cast<int32_t>(least)} << 32 | (first + __builtin_ctz(where));
    best = key < best ? key : best;
  }
  return best;
}

int64_t nearest(const float* x, CodeRows codes, int64_t d) {
  if (d == 4) return nearest_of<4>(x, codes, d);
  if (d == 8) return nearest_of<8>(x, codes, d);
  return nearest_of<0>(x, codes, d);
}

}  // namespace

extern const FirstPass first_pass = {kFirstLanes, pack_codes, pack_plain, pack_queries,
                                     score<FloatRows>, smallest,   at_most,    distances,  nearest};
