// After the scores: finds the cells that can hold the nearest code, and computes exact distances of their codes.
namespace revq::REVQ_ISA {
namespace {

float smallest(const float* minima, int64_t count) {
  Floats least[4];
  for (Floats& l : least) l = broadcast(kExcluded);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) least[k] = smaller(least[k], load<Floats>(minima + i + k * kLanes));
  }
  for (; i < count; i += kLanes) least[0] = smaller(least[0], load<Floats>(minima + i));
  return smallest_value(smaller(smaller(least[0], least[1]), smaller(least[2], least[3])));
}

int64_t at_most(const float* minima, int64_t count, float limit, int32_t* cells, int64_t capacity) {
  int64_t found = 0;
  const Floats limits = broadcast(limit);
  constexpr int64_t kGroup = 4 * kLanes;
  const auto report = [&](uint64_t mask, int64_t first) {
    for (; mask != 0; mask &= mask - 1) {
      if (found == capacity) return false;
      cells[found++] = static_cast<int32_t>(first + __builtin_ctzll(mask));
    }
    return true;
  };
  int64_t first = 0;
  // Nearly every query has one candidate, at a place that the branch predictor cannot know.  So the first loop makes a
  // bit per group of cells and the second visits the groups with a bit set: both make as many turns for one query as for
  // the next.
  while (first + kGroup <= count) {
    const int64_t groups = (count - first) / kGroup < 64 ? (count - first) / kGroup : 64;
    uint64_t some = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const float* four = minima + first + g * kGroup;
      const Floats low = smaller(load<Floats>(four), load<Floats>(four + kLanes));
      const Floats high = smaller(load<Floats>(four + 2 * kLanes), load<Floats>(four + 3 * kLanes));
      some |= uint64_t{lanes_at_most(smaller(low, high), limits) != 0} << g;
    }
    for (; some != 0; some &= some - 1) {
      const int64_t begin = first + __builtin_ctzll(some) * kGroup;
      uint64_t mask = 0;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        mask |= uint64_t{lanes_at_most(load<Floats>(minima + begin + i * kLanes), limits)} << (i * kLanes);
      }
      if (!report(mask, begin)) return found + 1;
    }
    first += groups * kGroup;
  }
  for (; first < count; first += kLanes) {
    if (!report(lanes_at_most(load<Floats>(minima + first), limits), first)) return found + 1;
  }
  return found;
}

// The queries that the lanes belong to: four elements of those of lanes i, i + 4, .., or one element of every lane's.
struct OneQuery {
  const float* x;
  REVQ_INLINE Floats quads(int64_t j, int) const { return repeat_quad<Floats>(x + j); }
  REVQ_INLINE Floats elements(int64_t j) const { return broadcast(x[j]); }
};

template <int kCell>
struct QueryPerCell {
  const float* x[kLanes / kCell];
  REVQ_INLINE Floats quads(int64_t j, int i) const {
    return load_quads<Floats>([&](int64_t lane) { return x[(lane + i) / kCell]; }, j);
  }
  REVQ_INLINE Floats elements(int64_t j) const {
    float column[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) column[lane] = x[lane / kCell][j];
    return load<Floats>(column);
  }
};

// The exact distance between every lane's query and row(lane): every subtraction, product and sum rounded on its own, sums
// in index order.
template <int D, typename Query, typename Row>
REVQ_INLINE Floats distances(const Query& query, const Row& row, int64_t d) {
  if constexpr (D > 0) d = D;
  Floats total = broadcast(0.0f);  // 0 + square is exact
  int64_t j = 0;
  for (; j + 4 <= d; j += 4) {
    Floats r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats difference = query.quads(j, i) - load_quads<Floats>([&](int64_t lane) { return row(lane + i); }, j);
      r[i] = difference * difference;
    }
    transpose(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total = total + r[i];
  }
  for (; j < d; ++j) {
    float column[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) column[i] = row(i)[j];
    const Floats difference = query.elements(j) - load<Floats>(column);
    total = total + difference * difference;
  }
  return total;
}

REVQ_INLINE int64_t key_of(float distance, int64_t code) {
  return int64_t{std::bit_cast<int32_t>(distance)} << 32 | code;
}

// The smallest key of one candidate, two registers of distances at a time.  Lanes past the last code repeat it: with a
// higher number, they never win.
template <int D>
int64_t nearest(const Candidate& candidate, int64_t d) {
  const CodeRows& codes = candidate.codes;
  const OneQuery query{candidate.x};
  int64_t best = INT64_MAX;
  for (int64_t first = 0; first < codes.count; first += 2 * kLanes) {
    const float* base = codes.rows + first * codes.stride;
    const int64_t left = codes.count - first;
    Floats low, high;
    if (left >= 2 * kLanes) {
      low = distances<D>(query, Strided(base, codes.stride), d);
      high = distances<D>(query, Strided(base + kLanes * codes.stride, codes.stride), d);
    } else if (left == kLanes) {
      low = high = distances<D>(query, Strided(base, codes.stride), d);
    } else {
      const auto clamped = [&](int64_t i) { return base + (i < left ? i : left - 1) * codes.stride; };
      low = distances<D>(query, clamped, d);
      high = left < kLanes ? low : distances<D>(query, [&](int64_t i) { return clamped(kLanes + i); }, d);
    }
    const float least = smallest_value(smaller(low, high));
    const Floats all = broadcast(least);
    const uint32_t where = lanes_at_most(low, all) | lanes_at_most(high, all) << kLanes;
    const int64_t key = key_of(least, first + __builtin_ctz(where));
    best = key < best ? key : best;
  }
  return best;
}

// The smallest keys of candidates that share a register: kCell lanes each.
template <int D, int kCell>
void nearest_in_lanes(const Candidate* candidates, int64_t count, int64_t d, int64_t* keys) {
  constexpr int64_t kTogether = kLanes / kCell;
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
    const Floats distance = whole ? distances<D>(query, inside, d) : distances<D>(query, clamped, d);
    const Floats least = smallest_of_groups<kCell>(distance);
    const uint32_t where = lanes_at_most(distance, least);
    float of_lane[kLanes];
    store(of_lane, least);
    for (int64_t i = 0; i < here; ++i) keys[first + i] = key_of(of_lane[i * kCell], __builtin_ctz(where >> i * kCell));
  }
}

template <int D>
void nearest_of_each_in(const Candidate* candidates, int64_t count, int64_t cell, int64_t d, int64_t* keys) {
  if (cell == 2) return nearest_in_lanes<D, 2>(candidates, count, d, keys);
  if constexpr (kLanes > 4) {
    if (cell == 4) return nearest_in_lanes<D, 4>(candidates, count, d, keys);
  }
  if constexpr (kLanes > 8) {
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
}  // namespace revq::REVQ_ISA
