// The walk through a tree.  Every clone compiles this one source, hence every clone has the same roundings.
//
// Why a child may be skipped: its bound is the exact distance of the query and the nearest point of its box, computed
// like any exact distance, operation by operation.  Rounding is monotone, so each step of the bound is at most the same
// step for any code in the box: bound <= D holds for the rounded values, with no slack (docs/kernels.md).  A child is
// visited unless its bound is strictly greater than the best D so far: an equal one may hold a lower index.
//
// Why 32 queries walk together: in one query's walk every step waits for the one before, and every branch depends on
// data.  So the queries go a level at a time, and what they are to visit is kept in lists: no step waits for its
// neighbor in the list.  The second-level cache is the limit then, so long lists are put in the order of their blocks.
namespace revq::REVQ_ISA {
namespace {

static_assert(kLeafCodes == 16 && kFanout == 16, "a leaf and a block are 16 lanes");

constexpr uint32_t kChild = (1u << kChildBits) - 1;

// Appends the children of a mask, with their bounds: child `first` + lane.
REVQ_INLINE void append(PendingList& to, uint32_t mask, int64_t q, int64_t first, const Lanes16& bounds) {
  const uint32_t entry = static_cast<uint32_t>(q) << kChildBits | static_cast<uint32_t>(first);
#if REVQ_LANES == 16
  const int64_t size = to.size;
  compress_store(to.entry + size, mask, Bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + entry);
  compress_store(to.bound + size, mask, bounds.part[0]);
  to.size = size + __builtin_popcount(mask);
#else
  float value[16];
  store16(value, bounds);
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    to.entry[to.size] = entry + lane;
    to.bound[to.size++] = value[lane];
  }
#endif
}

// Moves the entries with a bound of at most `share` of their query's best from one list to an empty one.  Both lists keep
// their order, and no branch depends on data.
REVQ_INLINE void move_near(PendingList& from, const float* best, float share, PendingList& to) {
  int64_t kept = 0, moved = 0;
#if REVQ_LANES == 16
  static_assert(kWalkers == 32, "two registers hold the best of all queries");
  const Floats first = load<Floats>(best), second = load<Floats>(best + 16), scale = broadcast(share);
  for (int64_t i = 0; i < from.size; i += 16) {
    const Bits entry = load<Bits>(from.entry + i);
    const Floats bound = load<Floats>(from.bound + i);
    const uint32_t present = first_lanes(from.size - i);
    const uint32_t near = lanes_at_most(bound, scale * look_up(first, second, entry >> kChildBits)) & present;
    compress_store(to.entry + moved, near, entry);
    compress_store(from.entry + kept, present & ~near, entry);
    compress_store(from.bound + kept, present & ~near, bound);
    moved += __builtin_popcount(near);
    kept += __builtin_popcount(present & ~near);
  }
#else
  for (int64_t i = 0; i < from.size; ++i) {
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

// D is the code dimension where the compiler knows it, else 0.
template <int D>
struct Walk {
  const TreeLayout& layout;
  const TreeGroup& group;
  const float* queries;
  WalkSpace& space;

  REVQ_INLINE int64_t dim() const { return D > 0 ? D : layout.d; }
  REVQ_INLINE const float* query(int64_t q) const { return queries + q * dim(); }

  // Adds a term of a distance.  0 + square is exact: a loop of unknown length needs no special case for the first term.
  REVQ_INLINE static Floats add_term(Floats sum, Floats square, int64_t j) {
    return D > 0 && j == 0 ? square : sum + square;
  }

  // Exact distances of a query and the 16 codes of a panel.
  REVQ_INLINE Lanes16 distance(const float* x, const float* panel) const {
    Lanes16 sum{};
    for (int64_t j = 0; j < dim(); ++j) {
      const Lanes16 code = load16(panel + j * 16);
      for (int h = 0; h < kParts; ++h) {
        const Floats difference = broadcast(x[j]) - code.part[h];
        sum.part[h] = add_term(sum.part[h], difference * difference, j);
      }
    }
    return sum;
  }

  // Exact distances of a query and the nearest point of each box of a block: `lower` corners, and behind them the upper.
  REVQ_INLINE Lanes16 bound(const float* x, const float* lower) const {
    const float* upper = lower + dim() * 16;
    Lanes16 sum{};
    for (int64_t j = 0; j < dim(); ++j) {
      const Lanes16 low = load16(lower + j * 16), high = load16(upper + j * 16);
      for (int h = 0; h < kParts; ++h) {
        const Floats here = broadcast(x[j]);
        const Floats difference = here - smaller(larger(here, low.part[h]), high.part[h]);
        sum.part[h] = add_term(sum.part[h], difference * difference, j);
      }
    }
    return sum;
  }

  REVQ_INLINE const float* boxes(int level, int64_t block) const {
    return group.boxes + (layout.first_block[level] + block) * 2 * dim() * 16;
  }
  REVQ_INLINE int64_t children(int level, int64_t block) const { return layout.children[level] - block * 16; }

  bool exceeds_cache() const { return layout.leaves * layout.panel_floats() > kSecondLevelFloats; }
  REVQ_INLINE static void fetch(const float* from, int64_t registers) {
    for (int64_t j = 0; j < registers; ++j) __builtin_prefetch(from + j * 16);
  }

  REVQ_INLINE void visit_leaf(int64_t q, int64_t leaf) {
    const Lanes16 lanes = distance(query(q), group.panels + leaf * dim() * 16);
    const uint32_t mask = lanes_at_most(lanes, space.best[q]);
    if (__builtin_expect(mask == 0, 1)) return;
    const int lane = smallest_lane(lanes, 16);  // the first of equals has the lowest index: the ids of a leaf ascend
    const float value = lanes[lane];
    const int32_t id = group.ids[leaf * 16 + lane];
    const bool nearer = value < space.best[q] || id < space.index[q];
    space.best[q] = value;  // not greater than the best, because the mask is not empty
    space.index[q] = nearer ? id : space.index[q];
  }

  // Visits the pending leaves with a bound of at most `share` of their query's best.
  void visit_leaves(float share) {
    PendingList& near = space.near;
    move_near(space.leaves, space.best, share, near);
    const bool prefetch = exceeds_cache();
    for (int64_t i = 0; i < near.size; ++i) {
      if (prefetch && i + kEntriesAhead < near.size)
        fetch(group.panels + (near.entry[i + kEntriesAhead] & kChild) * dim() * 16, dim());
      visit_leaf(near.entry[i] >> kChildBits, near.entry[i] & kChild);
    }
    space.visited_leaves += near.size;
  }

  // Visits all pending leaves, the nearer ones first: they lower the best, which spares some of the others.
  void flush_leaves() {
    visit_leaves(kNearShare);
    visit_leaves(1.0f);
    space.leaves.size = 0;
  }

  // Sorts entries by the low bits of their block: entries of one block stand together, and the first fetches it for all.
  static void group_by_block(const PendingList& list, uint32_t* order) {
    constexpr uint32_t kBuckets = 256;
    static_assert(kMaxPending + 16 < 1 << 16, "a place in a list fits 16 bits");
    uint16_t start[kBuckets] = {};
    for (int64_t i = 0; i < list.size; ++i) ++start[list.entry[i] % kBuckets];
    uint16_t before = 0;
    for (uint32_t bucket = 0; bucket < kBuckets; ++bucket) {
      const uint16_t count = start[bucket];
      start[bucket] = before;
      before += count;
    }
    for (int64_t i = 0; i < list.size; ++i) order[start[list.entry[i] % kBuckets]++] = list.entry[i];
  }

  // Visits the pending blocks of a level: their children join the list below, which is emptied whenever it is full.
  void flush_blocks(int level) {
    PendingList& list = space.blocks[level];
    PendingList& below = level == 0 ? space.leaves : space.blocks[level - 1];
    space.visited_blocks += list.size;
    const float* best = space.best;
    uint32_t grouped[kMaxPending];
    const uint32_t* entries = list.entry;
    if (list.size >= kMinGrouped) group_by_block(list, grouped), entries = grouped;
    const bool prefetch = exceeds_cache();
    const Walk here = *this;  // a copy, which the compiler knows that stores to the lists do not change
    const float* first_box = boxes(level, 0);
    const int64_t count = layout.children[level], size = list.size, box_floats = 2 * dim() * 16;
    for (int64_t i = 0; i < size; ++i) {
      if (prefetch && i + kEntriesAhead < size)
        fetch(first_box + (entries[i + kEntriesAhead] & kChild) * box_floats, box_floats / 16);
      const int64_t q = entries[i] >> kChildBits, block = entries[i] & kChild;
      const Lanes16 bounds = here.bound(here.query(q), first_box + block * box_floats);
      append(below, lanes_at_most(bounds, best[q]) & first_lanes(count - block * 16), q, block * 16, bounds);
      if (__builtin_expect(below.size > kMaxPending - 16, 0)) level == 0 ? flush_leaves() : flush_blocks(level - 1);
    }
    list.size = 0;
  }

  // Takes each query down to the block of leaves that looks nearest, and visits it: that gives a good best to start with.
  void seed(int64_t count) {
    const int top = layout.levels - 1;
    for (int64_t q = 0; q < count; ++q) space.seed[q] = 0;
    for (int level = top; level > 0; --level) {
      for (int64_t q = 0; q < count; ++q) {
        const int32_t block = space.seed[q];
        const Lanes16 bounds = bound(query(q), boxes(level, block));
        store16(space.passed[level][q], bounds);
        space.seed[q] = block * 16 + smallest_lane(bounds, children(level, block));
      }
    }
    for (int64_t q = 0; q < count; ++q) {
      const int32_t block = space.seed[q];
      const Lanes16 bounds = bound(query(q), boxes(0, block));
      const int64_t leaves = children(0, block);
      const int nearest = smallest_lane(bounds, leaves);
      space.best[q] = __builtin_inff();
      space.index[q] = INT32_MAX;
      visit_leaf(q, block * 16 + nearest);
      const uint32_t mask = lanes_at_most(bounds, space.best[q]) & first_lanes(leaves) & ~(1u << nearest);
      append(space.leaves, mask, q, block * 16, bounds);
      if (space.leaves.size > kMaxPending - 16) flush_leaves();
    }
    flush_leaves();
    space.visited_blocks += count * layout.levels;
    space.visited_leaves += count;
  }

  // Appends what `seed` left aside at a level, with the bounds that it computed there.
  void siblings(int level, int64_t count) {
    PendingList& below = space.blocks[level - 1];
    for (int64_t q = 0; q < count; ++q) {
      const int64_t child = space.seed[q] >> 4 * (level - 1), block = child / 16;
      const Lanes16 bounds = load16(space.passed[level][q]);
      const uint32_t mask = lanes_at_most(bounds, space.best[q]) & first_lanes(children(level, block));
      append(below, mask & ~(1u << child % 16), q, block * 16, bounds);
      if (below.size > kMaxPending - 16) flush_blocks(level - 1);
    }
  }

  void run(int64_t count) {
    seed(count);
    for (int level = 1; level < layout.levels; ++level) {  // bottom up: the nearest of what is left comes first
      siblings(level, count);
      for (int below = level - 1; below >= 0; --below) flush_blocks(below);
      flush_leaves();
    }
  }
};

// Calls use(Walk<D>), with d as a constant for the common ones.
template <typename Use>
void with_walk(const TreeLayout& layout, const TreeGroup& group, const float* queries, WalkSpace& space, Use use) {
  switch (layout.d) {
    case 4: return use(Walk<4>{layout, group, queries, space});
    case 8: return use(Walk<8>{layout, group, queries, space});
    case 16: return use(Walk<16>{layout, group, queries, space});
    default: return use(Walk<0>{layout, group, queries, space});
  }
}

void walk(const TreeLayout& layout, const TreeGroup& group, const float* queries, int64_t count, WalkSpace& space) {
  with_walk(layout, group, queries, space, [&](auto walk) { walk.run(count); });
}

void bound(const TreeLayout& layout, const TreeGroup& group, const float* query, int level, int64_t block,
           float* bounds) {
  WalkSpace unused;
  with_walk(layout, group, query, unused, [&](auto walk) {
    const Lanes16 lanes = walk.bound(query, walk.boxes(level, block));
    store16(bounds, lanes);
  });
}

int32_t scan(const TreeLayout& layout, const TreeGroup& group, const float* query) {
  int32_t best = INT32_MAX, lowest = INT32_MAX;  // the two words of the smallest key
  WalkSpace unused;
  const Walk<0> walk{layout, group, query, unused};
  for (int64_t leaf = 0; leaf < layout.leaves; ++leaf) {
    const Lanes16 lanes = walk.distance(query, group.panels + leaf * layout.d * 16);
    int32_t keys[16];
    for (int h = 0; h < kParts; ++h) store(keys + h * kLanes, key_bits(lanes.part[h]));
    const int32_t* ids = group.ids + leaf * 16;
    for (int lane = 0; lane < 16; ++lane) {
      if (keys[lane] < best || (keys[lane] == best && ids[lane] < lowest)) {
        best = keys[lane];
        lowest = ids[lane];
      }
    }
  }
  return lowest;
}

}  // namespace
}  // namespace revq::REVQ_ISA
