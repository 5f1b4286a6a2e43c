// Exact distances between queries and all codes of a tile.  Every clone compiles this one source, hence every clone has
// the same roundings: each subtraction, product and sum is rounded to float32 on its own, in index order.  Only the
// width of a register differs.
namespace revq::REVQ_ISA {
namespace {

constexpr int kPartsPerPanel = kPanelCodes / kLanes;
// As many as leave registers for the codes.
constexpr int64_t kQueriesPerStep = kLanes == 16 ? 4 : 2;

// Keeps the smallest upper word of a key per lane, and the panel that it came from.  Strictly smaller: of equal distances
// the earlier panel stays, and with it the lower index.
REVQ_INLINE void keep_smaller(Floats distance, int32_t here, Ints& key, Ints& panel) {
  const Ints candidate = key_bits(distance);
  const LaneMask nearer = less(candidate, key);
  key = smaller(candidate, key);
  panel = select(nearer, here, panel);
}

template <int... kLane>
REVQ_INLINE Ints lane_numbers(std::integer_sequence<int, kLane...>) {
  return Ints{kLane...};
}

// The smallest key of a query's lanes.  The first code of the tile has number 0.
REVQ_INLINE int64_t smallest_key(const Ints (&key)[kPartsPerPanel], const Ints (&panel)[kPartsPerPanel]) {
  constexpr auto kEveryLane = std::make_integer_sequence<int, kLanes>();
  Longs keys;
  for (int h = 0; h < kPartsPerPanel; ++h) {
    const Ints code =
        panel[h] * static_cast<int32_t>(kPanelCodes) + lane_numbers(kEveryLane) + h * static_cast<int32_t>(kLanes);
    Longs first, second;
    join_words(key[h], code, first, second, kEveryLane);
    const Longs here = smaller(first, second);
    keys = h == 0 ? here : smaller(keys, here);
  }
  return smallest_value(keys);
}

// D is the code dimension where the compiler knows it, else 0.
template <int D>
void exact_in(const ExactTile& tile) {
  const int64_t d = D > 0 ? D : tile.d;
  for (int64_t q = 0; q < tile.count; q += kQueriesPerStep) {
    const float* x[kQueriesPerStep];
    for (int64_t i = 0; i < kQueriesPerStep; ++i) {  // the last query stands in for those past the end
      x[i] = tile.queries + tile.rows[q + i < tile.count ? q + i : tile.count - 1] * d;
    }
    Ints key[kQueriesPerStep][kPartsPerPanel], panel[kQueriesPerStep][kPartsPerPanel];
    for (int64_t i = 0; i < kQueriesPerStep; ++i) {
      for (int h = 0; h < kPartsPerPanel; ++h) {
        key[i][h] = Ints{} + INT32_MAX;  // no distance has these bits
        panel[i][h] = Ints{};
      }
    }
    const float* codes = tile.panels;
    for (int64_t p = 0; p < tile.num_panels; ++p) {
      Floats distance[kQueriesPerStep][kPartsPerPanel];
      for (int h = 0; h < kPartsPerPanel; ++h) {
        const Floats c = load<Floats>(codes + h * kLanes);
        for (int64_t i = 0; i < kQueriesPerStep; ++i) {
          const Floats difference = broadcast(x[i][0]) - c;
          distance[i][h] = difference * difference;
        }
      }
      codes += kPanelCodes;
      for (int64_t j = 1; j < d; ++j, codes += kPanelCodes) {
        for (int h = 0; h < kPartsPerPanel; ++h) {
          const Floats c = load<Floats>(codes + h * kLanes);
          for (int64_t i = 0; i < kQueriesPerStep; ++i) {
            const Floats difference = broadcast(x[i][j]) - c;
            distance[i][h] = distance[i][h] + difference * difference;
          }
        }
      }
      for (int64_t i = 0; i < kQueriesPerStep; ++i) {
        for (int h = 0; h < kPartsPerPanel; ++h) {
          keep_smaller(distance[i][h], static_cast<int32_t>(p), key[i][h], panel[i][h]);
        }
      }
    }
    for (int64_t i = 0; i < kQueriesPerStep && q + i < tile.count; ++i) {
      int64_t& smallest = tile.keys[tile.rows[q + i]];
      const int64_t found = smallest_key(key[i], panel[i]) + tile.first;
      smallest = found < smallest ? found : smallest;
    }
  }
}

void exact(const ExactTile& tile) {
  switch (tile.d) {
    case 1: return exact_in<1>(tile);
    case 2: return exact_in<2>(tile);
    case 3: return exact_in<3>(tile);
    case 4: return exact_in<4>(tile);
    case 8: return exact_in<8>(tile);
    default: return exact_in<0>(tile);
  }
}

}  // namespace
}  // namespace revq::REVQ_ISA
