// The tuning constants of the tree, each with its reason.  None changes a result.
#pragma once

#include <cstdint>

namespace revq {

// ---- Building

// Codes from which the widest dimension is estimated: enough to tell it from the others; a wrong guess costs visits only.
constexpr int64_t kVarianceSamples = 512;
// Ranges per thread before whole subtrees are shared out: subtrees differ in time, and more pieces even that out.
constexpr int64_t kRangesPerThread = 8;

// ---- Filling

// Blocks of leaves that a thread takes at a time: enough work to pay for taking it, few enough to balance.
constexpr int64_t kBlocksPerItem = 4;
// Leaves of more floats than this are stored past the caches.  A store into a cache reads its line first, and leaves that
// do not fit would push out the codebook that is being read.
constexpr int64_t kCachedLeafFloats = int64_t{3} << 19;
// The rows of a leaf are prefetched this many leaves ahead: their order is random to a hardware prefetcher.
constexpr int64_t kLeavesAhead = 10;

// ---- Walking

// Queries that walk together: enough to hide the latency of one query's step behind the steps of the others.
constexpr int64_t kWalkers = 32;
// Items of the search per thread: enough that no thread waits long for the last one.
constexpr int64_t kSearchItemsPerThread = 8;
// Pending children per list: bounds the workspace whatever the data.
constexpr int64_t kMaxPending = 1024;
// Lists of at least this many entries are put in the order of their blocks; in a shorter one, too few entries share a
// block to pay for that.
constexpr int64_t kMinGrouped = 256;
// Where the codes exceed a core's second-level cache (this many floats), pending boxes and leaves are prefetched this many
// entries ahead: the time of one access to memory, in entries.
constexpr int64_t kEntriesAhead = 6, kSecondLevelFloats = int64_t{1} << 18;
// Leaves with a bound of at most this share of the best distance are visited first: they lower the best, which spares
// others.
constexpr float kNearShare = 0.5f;

}  // namespace revq
