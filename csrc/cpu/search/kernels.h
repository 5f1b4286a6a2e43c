// The first pass of the search: scores of all codes, a minimum per cell of codes.
//
// A tile is lanes * cell codes: lane l of a register's vector i holds code l * cell + i, so that a cell, the codes of
// one lane over the tile, lies together in the codebook.
#pragma once

#include <cstdint>

namespace revq {

// Queries are packed transposed in groups of 12: a kernel takes 12, 6, 4, 3, 2 or 1 of them at a time.
constexpr int64_t kQueriesPerPack = 12;
// Vectors that a kernel loads together: a panel is [rows + 1][2][lanes] words.  Row 0 is |c'|^2 / 2; row j + 1 number j
// of the codes, or, rounded to whole numbers, their numbers 2 j and 2 j + 1, two to a word.
constexpr int64_t kVectorsPerPanel = 2;

// Sizes of one call: queries [packs][rows][12], tiles [tiles][cell / 2][rows + 1][2][lanes], minima [count][stride], of
// which [tiles][lanes] are written.
struct Scores {
  const float* queries;
  int64_t count, rows;
  const float* panels;
  int64_t tiles, cell;
  float* minima;
  int64_t stride;
};

// Rows of codes, in the order of their numbers.
struct CodeRows {
  const float* rows;
  int64_t stride, count;
};

// A query, and codes that may hold its nearest.
struct Candidate {
  const float* x;
  CodeRows codes;
};

constexpr int64_t kMaxFirstLanes = 16;

// One instruction set's clone.
struct FirstPass {
  int64_t lanes;
  // Centers, transposes and pads codes.  Returns the largest |c'|^2 / 2 among those that can win, with its rounding
  // error; a NaN when a code holds one.
  float (*pack_codes)(CodeRows codes, int64_t d, const float* center, int64_t cell, int64_t tiles, float* panels);
  // Transposes codes for the tile of tile.h; lanes past the last code repeat it, and so never win there: their distance
  // is not smaller and their number is higher.
  void (*pack_plain)(CodeRows codes, int64_t d, const float* zeros, float* panels);
  // Centers, negates and transposes queries [count, d]; a query out of the certificate's range is packed as zeros.
  void (*pack_queries)(const float* rows, int64_t count, int64_t d, const float* center, float* packed, double* norms);
  void (*score)(const Scores& scores);
  float (*smallest)(const float* minima, int64_t count);
  // Numbers of the cells with a minimum of at most `limit`; stops once there are more than `capacity`.
  int64_t (*at_most)(const float* minima, int64_t count, float limit, int32_t* cells, int64_t capacity);
  // The smallest key of each candidate, its codes numbered from 0: at most `cell`, a power of two.  No distance may be a
  // NaN.
  void (*nearest_of_each)(const Candidate* candidates, int64_t count, int64_t cell, int64_t d, int64_t* keys);
};

// The first pass on rounded vectors: 16-bit whole numbers, two to a word, and sums that are exact.
struct RoundedPass {
  // Panels of pack_codes, times `scale`, in place; a scaled code's length is less than kMaxRounded.
  void (*round_codes)(float* panels, int64_t d, int64_t count, float scale);
  // Packs of pack_queries, times `scale`, to [packs][rows][12], and the squared lengths of the rounded queries.
  void (*round_queries)(const float* packed, int64_t count, int64_t d, float scale, float* rounded, int32_t* squares);
  void (*score)(const Scores& scores);
};

// The clones for an instruction set that the machine has; nullptr when this build has none, or, of the second, where
// it would be no faster.
const FirstPass* first_pass(int isa);
const RoundedPass* rounded_pass(int isa);

namespace baseline { extern const FirstPass first_pass; }
namespace x86_64_v3 {
extern const FirstPass first_pass;
extern const RoundedPass rounded_pass;
}
namespace x86_64_v4 { extern const FirstPass first_pass; }
namespace x86_64_v4_vnni { extern const RoundedPass rounded_pass; }

}  // namespace revq
