// What one instruction set's clone offers to the brute-force search: tables of functions on packed vectors.  README.md
// draws the layout of block, run, tile, panel and cell.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace revq {

// ---- The key of the contract.  Keys order candidates: a NaN first, then by exact distance, then by code.

// Greater than every key: no distance has the bits of INT32_MAX.
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::max();

inline int64_t code_of(int64_t key) { return key & 0xFFFFFFFF; }

// The distance of a key that is not kNoKey; -1 stands for a NaN.
inline float distance_of(int64_t key) {
  const auto bits = static_cast<int32_t>(key >> 32);
  return bits < 0 ? -1.0f : std::bit_cast<float>(bits);
}

// ---- Arguments of the kernels.

// Rows of codes that follow each other in the codebook, `stride` floats apart.
struct CodeRows {
  const float* rows;
  int64_t stride, count;
};

// The exact pass reads codes in panels of 16, transposed: panel[j * kPanelCodes + lane] is element j of code `lane`.
constexpr int64_t kPanelCodes = 16;

// The queries `rows[0 .. count)` of queries [][d], and panels [num_panels][d][kPanelCodes] of codes whose numbers start
// at `first`.  keys[q] of each such query becomes the smallest so far.
struct ExactTile {
  const float* queries;
  const int64_t* rows;
  int64_t count, d;
  const float* panels;
  int64_t num_panels, first;
  int64_t* keys;
};

// The first pass reads queries transposed, in packs of 12: its loops take 12, 6, 4, 3, 2 or 1 of them at a time.
constexpr int64_t kQueriesPerPack = 12;
// And codes in panels of two registers, which a loop loads together: [rows + 1][2][lanes] words.  Row 0 is |c'|^2 / 2;
// row j + 1 is element j of the codes, or, in int16, their elements 2 j and 2 j + 1, two to a word.
constexpr int64_t kVectorsPerPanel = 2;

// queries [packs][rows][12], tiles [tiles][cell / 2][rows + 1][2][lanes], minima [count][stride], of which
// [tiles][lanes] are written.
struct Scores {
  const float* queries;
  int64_t count, rows;
  const float* panels;
  int64_t tiles, cell;
  float* minima;
  int64_t stride;
};

// A query, and the codes of a cell that may hold its nearest code.
struct Candidate {
  const float* x;
  CodeRows codes;
};

// ---- The tables.

struct SearchKernels {
  int64_t lanes;  // floats of a register
  void (*exact)(const ExactTile& tile);
  // Transposes codes for `exact`.  Lanes past the last code repeat it and never win: their distance is not smaller and
  // their number is higher.
  void (*pack_exact)(CodeRows codes, int64_t d, const float* zeros, float* panels);
  // Subtracts the center from codes, transposes and pads them.  Returns the largest |c'|^2 / 2 among those that can win,
  // with its rounding error; a NaN when a code holds one.
  float (*pack_codes)(CodeRows codes, int64_t d, const float* center, int64_t cell, int64_t tiles, float* panels);
  // Subtracts queries [count, d] from the center (the negative of x') and transposes them.  A query outside the range of
  // the certificate is packed as zeros.
  void (*pack_queries)(const float* rows, int64_t count, int64_t d, const float* center, float* packed, double* norms);
  void (*score)(const Scores& scores);
  float (*smallest)(const float* minima, int64_t count);
  // Numbers of the cells with a minimum of at most `limit`; stops once there are more than `capacity`.
  int64_t (*at_most)(const float* minima, int64_t count, float limit, int32_t* cells, int64_t capacity);
  // The smallest key of each candidate, in which its first code has number 0.  A candidate has at most `cell` codes, a
  // power of two.  No distance may be a NaN.
  void (*nearest_of_each)(const Candidate* candidates, int64_t count, int64_t cell, int64_t d, int64_t* keys);
};

// The first pass on vectors rounded to int16, two elements to a word, with sums that are exact.
struct Int16Kernels {
  // Rounds panels of pack_codes, times `scale`, in place; a scaled code is shorter than kMaxRounded.
  void (*round_codes)(float* panels, int64_t d, int64_t count, float scale);
  // Rounds packs of pack_queries, times `scale`, to [packs][rows][12]; also the squared lengths of the rounded queries.
  void (*round_queries)(const float* packed, int64_t count, int64_t d, float scale, float* rounded, int32_t* squares);
  void (*score)(const Scores& scores);
};

}  // namespace revq
