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

// The queries of all lanes: four of their numbers, for the lanes i, i + 4, ..; one number for every lane.
struct OneQuery {
  const float* x;
  REVQ_INLINE Vec fours(int64_t j, int) const { return repeat<Vec>(x + j); }
  REVQ_INLINE Vec numbers(int64_t j) const { return everywhere(x[j]); }
};

template <int kCell>
struct QueryPerCell {
  const float* x[kFirstLanes / kCell];
  REVQ_INLINE Vec fours(int64_t j, int i) const {
    return load_fours<Vec>([&](int64_t lane) { return x[(lane + i) / kCell]; }, j);
  }
  REVQ_INLINE Vec numbers(int64_t j) const {
    float column[kFirstLanes];
    for (int64_t lane = 0; lane < kFirstLanes; ++lane) column[lane] = x[lane / kCell][j];
    return load_as<Vec>(column);
  }
};

// D of the contract of every lane's query and row(lane): every subtraction, product and sum rounded on its own, sums in
// index order.
template <int D, typename Query, typename Row>
REVQ_INLINE Vec distances(const Query& query, const Row& row, int64_t d) {
  if constexpr (D > 0) d = D;
  Vec total = everywhere(0.0f);  // 0 + square is exact
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    Vec r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec difference = query.fours(j, i) - load_fours<Vec>([&](int64_t lane) { return row(lane + i); }, j);
      r[i] = difference * difference;
    }
    transpose(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total = total + r[i];
  }
  for (; j < d; ++j) {
    float column[kFirstLanes];
    for (int64_t i = 0; i < kFirstLanes; ++i) column[i] = row(i)[j];
    const Vec difference = query.numbers(j) - load_as<Vec>(column);
    total = total + difference * difference;
  }
  return total;
}

REVQ_INLINE int64_t key_of(float distance, int64_t code) {
  return int64_t{std::bit_cast<int32_t>(distance)} << 32 | code;
}

// One candidate, two registers of distances at a time.  Lanes past the last code repeat it: a higher number, which
// never wins.
template <int D>
int64_t nearest(const Candidate& candidate, int64_t d) {
  const CodeRows& codes = candidate.codes;
  const OneQuery query{candidate.x};
  int64_t best = INT64_MAX;
  for (int64_t first = 0; first < codes.count; first += 2 * kFirstLanes) {
    const float* base = codes.rows + first * codes.stride;
    const int64_t left = codes.count - first;
    Vec low, high;
    if (left >= 2 * kFirstLanes) {
      low = distances<D>(query, Strided(base, codes.stride), d);
      high = distances<D>(query, Strided(base + kFirstLanes * codes.stride, codes.stride), d);
    } else if (left == kFirstLanes) {
      low = high = distances<D>(query, Strided(base, codes.stride), d);
    } else {
      const auto clamped = [&](int64_t i) { return base + (i < left ? i : left - 1) * codes.stride; };
      low = distances<D>(query, clamped, d);
      high = left < kFirstLanes ? low : distances<D>(query, [&](int64_t i) { return clamped(kFirstLanes + i); }, d);
    }
    const float least = smallest_lane(smaller(low, high));
    const Vec all = everywhere(least);
    const uint32_t where = lanes_at_most(low, all) | lanes_at_most(high, all) << kFirstLanes;
    const int64_t key = key_of(least, first + __builtin_ctz(where));
    best = key < best ? key : best;
  }
  return best;
}

// Candidates that share a register: kCell lanes each.
template <int D, int kCell>
void nearest_in_lanes(const Candidate* candidates, int64_t count, int64_t d, int64_t* keys) {
  constexpr int64_t kTogether = kFirstLanes / kCell;
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t here = count - first < kTogether ? count - first : kTogether;
    QueryPerCell<kCell> query;
    CodeRows codes[kTogether];
    bool whole = true;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTogether; ++i) {
      const Candidate& candidate = candidates[first + (i < here ? i : 0)];
      query.x[i] = candidate.x;
      codes[i] = candidate.codes;
      whole = whole && codes[i].count == kCell;
    }
    const auto inside = [&](int64_t lane) { return codes[lane / kCell].rows + lane % kCell * codes[0].stride; };
    const auto clamped = [&](int64_t lane) {
      const CodeRows& c = codes[lane / kCell];
      return c.rows + (lane % kCell < c.count ? lane % kCell : c.count - 1) * c.stride;
    };
    const Vec distance = whole ? distances<D>(query, inside, d) : distances<D>(query, clamped, d);
    Vec least = distance;
#pragma GCC unroll 3
    for (int step = 1; step < kCell; step *= 2) {  // with the lane whose number differs by this bit
      typedef int32_t Lanes __attribute__((vector_size(4 * REVQ_LANES)));
      Lanes other;
      for (int32_t lane = 0; lane < kFirstLanes; ++lane) other[lane] = lane ^ step;
      least = smaller(least, __builtin_shuffle(least, other));
    }
    const uint32_t where = lanes_at_most(distance, least);
    float of_lane[kFirstLanes];
    store_as(of_lane, least);
    for (int64_t i = 0; i < here; ++i) keys[first + i] = key_of(of_lane[i * kCell], __builtin_ctz(where >> i * kCell));
  }
}

template <int D>
void nearest_of_each_in(const Candidate* candidates, int64_t count, int64_t cell, int64_t d, int64_t* keys) {
  if (cell == 2) return nearest_in_lanes<D, 2>(candidates, count, d, keys);
  if constexpr (kFirstLanes > 4) {
    if (cell == 4) return nearest_in_lanes<D, 4>(candidates, count, d, keys);
  }
  if constexpr (kFirstLanes > 8) {
    if (cell == 8) return nearest_in_lanes<D, 8>(candidates, count, d, keys);
  }
  for (int64_t i = 0; i < count; ++i) keys[i] = nearest<D>(candidates[i], d);
}

void nearest_of_each(const Candidate* candidates, int64_t count, int64_t cell, int64_t d, int64_t* keys) {
  if (d == 4) return nearest_of_each_in<4>(candidates, count, cell, d, keys);
  if (d == 8) return nearest_of_each_in<8>(candidates, count, cell, d, keys);
  return nearest_of_each_in<0>(candidates, count, cell, d, keys);
}

}  // namespace

extern const FirstPass first_pass = {kFirstLanes, pack_codes, pack_plain, pack_queries,
                                     score<FloatRows>, smallest,   at_most,    nearest_of_each};
