// The tuning constants of the brute-force search, each with its reason.  None changes a result.
#pragma once

#include <cstdint>

namespace revq {

// ---- Which form a search takes (plan.cpp)

// The first pass pays when a query's share of packing the codes and a code's share of packing the queries are small:
// with fewer queries, codes or elements than these, exact distances over all codes cost less.  An exact distance costs
// as its d elements do, and about two more for the key.
constexpr int64_t kMinQueries = 12, kMinCodes = 48, kMinElements = 3072, kElementsPerKey = 2;
// Beyond this d the packed codes of one tile leave the second-level cache.
constexpr int64_t kMaxFirstPassDim = 4096;

// ---- Sizes (plan.cpp)

// Queries of a block share one packing of the codes: with this many, packing is a few per cent of the arithmetic.
constexpr int64_t kQueriesPerBlock = 512;
// Queries whose minima exist at a time: the minima of a run stay in the second-level cache.
constexpr int64_t kQueriesPerSweep = 96;
constexpr int64_t kMinimaFloats = 3 * (int64_t{1} << 14);
// The packed codes of a run stay in the second-level cache.
constexpr int64_t kPanelFloats = int64_t{1} << 18;
// Codes of a cell: exact distances of a whole cell have to be cheap compared with the scores of all codes (few
// elements), and the minima of all cells cheap compared with both (not too few codes).  So a cell has at most these
// codes and elements, and at most the square root of K / 16 codes.
constexpr int64_t kMaxCell = 32, kElementsPerCell = 512, kCodesPerSquare = 16;
// Floats of a thread's workspace, at most.  It holds the queries of a block up to three times, which take
// at most half of it.
constexpr int64_t kMaxWorkspace = int64_t{1} << 20;
constexpr int64_t kShareOfQueries = 6;

// ---- Candidates (block.cpp)

// Candidate cells of a query in a run; with more, exact distances over all codes of the run decide.
constexpr int64_t kMaxCells = 24;
// Queries that take each step after the scores together: one query's steps wait for each other, those of others do not.
constexpr int64_t kQueriesPerStage = 32;
// Cells that are evaluated together: enough to fill registers where a cell is smaller than one.
constexpr int64_t kMaxPendingCells = 64;
// Elements of a candidate cell that are prefetched, at most: those of a usual cell, so that long rows push nothing out.
constexpr int64_t kPrefetchedElements = 512;

// ---- Duplicate codes (block.cpp)

// Duplicates are looked for once a quarter of the queries of a sweep are unsettled: otherwise they cost little.
constexpr int64_t kManyUnsettled = kQueriesPerSweep / 4;
// And they stay excluded if at least one code in kCodesPerDuplicate is a duplicate: otherwise they are not the reason.
constexpr int64_t kCodesPerDuplicate = 4;
// Places of the hash table that are tried per code: bounds the time where many hashes collide.
constexpr int kProbes = 8;

// ---- int16 (block.cpp)

// Two elements share a word, so d = 1 gains nothing; fewer queries do not pay for rounding the codes.
constexpr int64_t kMinInt16Dim = 2, kMinInt16Queries = 24;
// The scale of vectors longer than this is far from the limits of float32.
constexpr double kMinLength = 0x1p-60;
// Room in a scale for the slightly longer codes of a later run: it keeps the scale, and the rounded queries stay valid.
constexpr double kScaleRoom = 0.97;
// int16 saves the time of one exact distance per kScoresPerDistance scores.  A sweep is inefficient when it computed
// more exact distances than the usual number of candidate cells holds and this saving pays for:
//   distances > queries * (kUsualCells * cell + codes / kScoresPerDistance).
// Brute force over a run computes its distances in order, which makes each of them cheaper by the last factor.
constexpr int64_t kUsualCells = 3, kScoresPerDistance = 64, kBruteForcePerDistance = 8;

// ---- Threads (cpu/search.cpp)

// Elements of the codes of an item, at least: fewer are not worth packing the queries for.
constexpr int64_t kMinElementsPerItem = int64_t{1} << 15;
// A thread takes up to kGroupsTogether neighboring groups of the same queries at a time: their indices, and most often
// their rows, share cache lines.  It does so only if a query is compared with at most kMaxElementsTogether elements:
// there false sharing dominates.
constexpr int64_t kGroupsTogether = 16, kMaxElementsTogether = int64_t{1} << 14;
// Floats of all threads' workspaces, beyond the size of the packed codebook.
constexpr int64_t kSharedWorkspace = 3 * (int64_t{1} << 19);
// Codes whose mean is the center: enough to come near the mean of all.
constexpr int64_t kCenterSamples = 64;

}  // namespace revq
