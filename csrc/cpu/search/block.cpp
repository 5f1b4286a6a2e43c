// Per run of codes: scores of all pairs, then, per query, exact distances of the cells that the certificate cannot
// exclude.
#include "cpu/search/block.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/sizes.h"

namespace revq {
namespace {

constexpr int64_t kAlign = 16;  // floats
// The panels of a tile of brute force stay in the first-level cache, beside the queries of a step.
constexpr int64_t kTileFloats = 4 * 1024;

// Rows of a panel in int16.
int64_t rows_of_words(int64_t d) { return divide_up(d, 2); }

// A hash of the bits of a code.
uint64_t hash_of(const float* row, int64_t d) {
  uint64_t sum = 0, factor = 0x9E3779B97F4A7C15;
  for (int64_t j = 0; j < d; ++j) {
    sum += (uint64_t{std::bit_cast<uint32_t>(row[j])} + 1) * factor;
    factor = factor * 0xD1342543DE82EF95 + 2;  // odd again
  }
  return sum ^ sum >> 32;
}

}  // namespace

// The result is the contract's by construction: no bound is needed.
void BruteForce::search(const float* queries, const std::vector<int64_t>& rows, CodeRows codes, int64_t first,
                        int64_t* keys) {
  const int64_t step = std::max<int64_t>(1, kTileFloats / (kPanelCodes * d_));
  const int64_t panels = divide_up(codes.count, kPanelCodes);
  panels_.resize(std::max<size_t>(panels_.size(), std::min(step, panels) * kPanelCodes * d_));
  for (int64_t panel = 0; panel < panels; panel += step) {
    const int64_t here = std::min(step, panels - panel), begin = panel * kPanelCodes;
    const int64_t count = std::min(here * kPanelCodes, codes.count - begin);
    kernels_.pack_exact({codes.rows + begin * codes.stride, codes.stride, count}, d_, zeros_.data(), panels_.data());
    kernels_.exact(
        {queries, rows.data(), static_cast<int64_t>(rows.size()), d_, panels_.data(), here, first + begin, keys});
  }
}

BlockSearch::BlockSearch(const Plan& plan, float* workspace)
    : plan_(plan),
      kernels_(*kernels(plan.isa).search),
      int16_kernels_(plan.int16 && plan.d >= kMinInt16Dim ? kernels(plan.isa).int16 : nullptr),
      certificate_(plan.d, plan.certificate_scale),
      int16_certificate_(plan.d, plan.certificate_scale),
      norms_(round_up(plan.queries, kQueriesPerPack)),
      squares_(norms_.size()),
      brute_force_(plan.isa, plan.d) {
  unsettled_.reserve(plan.queries);
  queries_ = workspace;
  packed_ = queries_ + round_up(plan.queries * plan.d, kAlign);
  rounded_queries_ = packed_ + round_up(round_up(plan.queries, kQueriesPerPack) * plan.d, kAlign);
  panels_ = rounded_queries_ + round_up(round_up(plan.queries, kQueriesPerPack) * rows_of_words(plan.d), kAlign);
  minima_ = panels_ + plan.codes_per_run() * (plan.d + 1);
}

void BlockSearch::begin(int64_t count, const float* center, int64_t* keys) {
  count_ = count;
  center_ = center;
  keys_ = keys;
  if (!plan_.first_pass) return;
  kernels_.pack_queries(queries_, count, plan_.d, center, packed_, norms_.data());
  double longest = 0;
  for (int64_t q = 0; q < count; ++q) longest = std::max(longest, norms_[q] <= kMaxNorm ? norms_[q] : 0.0);
  longest_ = longest;
  scale_ = 0;
}

void BlockSearch::search(CodeRows codes, int64_t first) {
  unsettled_.clear();
  const int64_t tiles = plan_.first_pass ? divide_up(codes.count, plan_.codes_per_tile()) : 0;
  if (!plan_.first_pass || !pack(codes, tiles)) {
    for (int64_t q = 0; q < count_; ++q) unsettled_.push_back(q);
  } else {
    for (int64_t begin = 0; begin < count_; begin += kQueriesPerSweep) {
      const int64_t end = std::min(begin + kQueriesPerSweep, count_);
      const size_t settled = unsettled_.size();
      while (!settle_sweep(codes, first, tiles, begin, end)) unsettled_.resize(settled);  // again, with better panels
    }
  }
  if (unsettled_.empty()) return;
  counters_.brute_force += static_cast<int64_t>(unsettled_.size());
  brute_force_.search(queries_, unsettled_, codes, first, keys_);
}

// One sweep.  Returns false when it was inefficient and has to be made again with better panels: with duplicates
// excluded, or in float32.  Each happens at most once for a run of codes.
bool BlockSearch::settle_sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end) {
  const Counters before = counters_;
  const size_t settled = unsettled_.size();
  sweep(codes, first, tiles, begin, end);
  const size_t unsettled = unsettled_.size() - settled;
  if (!duplicates_ && may_have_duplicates_ && static_cast<int64_t>(unsettled) >= kManyUnsettled) {
    exclude_duplicates(codes);
    if (duplicates_) return false;
  }
  if (!rounded_) return true;
  if (int16_is_inefficient(before, unsettled, codes, end - begin)) {
    int16_kernels_ = nullptr;
    pack(codes, tiles);
    return false;
  }
  counters_.int16 += end - begin;
  return true;
}

// Packs the panels of the run.  False when a code holds a NaN: it wins by the contract, and no score tells where it is.
bool BlockSearch::pack(CodeRows codes, int64_t tiles) {
  const float largest = kernels_.pack_codes(codes, plan_.d, center_, plan_.cell, tiles, panels_);
  if (std::isnan(largest)) return false;
  rounded_ = int16_kernels_ != nullptr && count_ >= kMinInt16Queries && round(largest, tiles);
  if (duplicates_) exclude_duplicates(codes);
  return true;
}

// Rounds panels and queries to int16, as finely as 16 bits allow; false where the scale would leave float's range.
bool BlockSearch::round(float largest, int64_t tiles) {
  const double longest = std::max(longest_, std::sqrt(2.0 * largest));
  if (!(longest >= kMinLength)) return false;
  if (const double scaled = scale_ * longest;
      scaled > kMaxScaled || scaled < kMaxScaled / 2) {  // the scale of the last run does not fit
    scale_ = static_cast<float>(kScaleRoom * kMaxScaled / longest);
    int16_kernels_->round_queries(packed_, count_, plan_.d, scale_, rounded_queries_, squares_.data());
  }
  int16_kernels_->round_codes(panels_, plan_.d, tiles * plan_.cell / kVectorsPerPanel, scale_);
  return true;
}

// Whether the candidates of a sweep cost more than int16 saves: few vectors far from all others set the scale, and leave
// the others few of the 16 bits.
bool BlockSearch::int16_is_inefficient(const Counters& before, size_t unsettled, CodeRows codes,
                                       int64_t queries) const {
  const int64_t cells = counters_.cells - before.cells, usual = kUsualCells * plan_.cell;
  const int64_t distances = cells * plan_.cell + static_cast<int64_t>(unsettled) * codes.count / kBruteForcePerDistance;
  return distances > queries * (usual + codes.count / kScoresPerDistance);
}

float BlockSearch::limit(double distance, int64_t q) const {
  if (!rounded_) return certificate_.limit(distance, norms_[q]);
  return int16_certificate_.limit(certificate_.reach(distance, norms_[q]) * scale_, squares_[q]);
}

float BlockSearch::guess(float smallest, int64_t q) const {
  return rounded_ ? int16_certificate_.guess(smallest, squares_[q]) : certificate_.guess(smallest, norms_[q]);
}

// A code with the bits of an earlier one has the same distance and a higher index, so it never wins: its score becomes
// that of a lane that can win for no query.  Otherwise many duplicates of a winner would fill its list of candidates.
void BlockSearch::exclude_duplicates(CodeRows codes) {
  const int64_t d = plan_.d, rows = rounded_ ? rows_of_words(d) : d;
  const int64_t lanes = kernels_.lanes, row = kVectorsPerPanel * lanes;
  // The bits of the word are those of a quiet NaN, which a copy keeps.
  const float excluded = rounded_ ? std::bit_cast<float>(kExcludedWord) : kExcluded;
  const auto places = std::bit_ceil(static_cast<uint64_t>(2 * codes.count));
  table_.assign(places, -1);
  int64_t found = 0;
  for (int64_t code = 0; code < codes.count; ++code) {
    const float* values = codes.rows + code * codes.stride;
    uint64_t place = hash_of(values, d) & (places - 1);
    for (int probe = 0; probe < kProbes; ++probe, place = (place + 1) & (places - 1)) {
      if (table_[place] < 0) {
        table_[place] = static_cast<int32_t>(code);
        break;
      }
      if (std::memcmp(values, codes.rows + table_[place] * codes.stride, d * sizeof(float)) != 0) continue;
      ++found;
      const int64_t i = code % plan_.cell, lane = code / plan_.cell % lanes;
      float* panel = panels_ + (code / plan_.codes_per_tile() * plan_.cell + i) / kVectorsPerPanel * (rows + 1) * row;
      panel += i % kVectorsPerPanel * lanes + lane;
      for (int64_t j = 0; j <= rows; ++j) panel[j * row] = j == 0 ? excluded : 0.0f;
      break;
    }
  }
  duplicates_ = may_have_duplicates_ = found * kCodesPerDuplicate >= codes.count;
}

// Scores of some queries, then their candidates while the minima are in the cache.  The steps of one query wait for each
// other; so each step is taken for many queries before the next, and their latencies overlap.
void BlockSearch::sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end) {
  const int64_t cells = tiles * kernels_.lanes, stride = plan_.minima_stride();
  const int64_t rows = rounded_ ? rows_of_words(plan_.d) : plan_.d;
  const float* queries = (rounded_ ? rounded_queries_ : packed_) + begin * rows;
  const auto score = rounded_ ? int16_kernels_->score : kernels_.score;
  score({queries, end - begin, rows, panels_, tiles, plan_.cell, minima_, stride});
  for (int64_t some = begin; some < end; some += kQueriesPerStage) {
    const int64_t last = std::min(some + kQueriesPerStage, end);
    const auto minima = [&](int64_t q) { return minima_ + (q - begin) * stride; };
    const auto found = [&](int64_t q) -> Candidates& { return candidates_[q - some]; };
    for (int64_t q = some; q < last; ++q) found(q).least = kernels_.smallest(minima(q), cells);
    for (int64_t q = some; q < last; ++q) found(q).limit = first_limit(q, found(q).least);
    for (int64_t q = some; q < last; ++q) find(codes, minima(q), cells, found(q));
    for (int64_t q = some; q < last; ++q) add_pending(q, codes, first, found(q));
    evaluate_pending();
    for (int64_t q = some; q < last; ++q) {
      if (!check(q, codes, first, minima(q), cells, found(q))) unsettled_.push_back(q);
    }
  }
}

// The first limit for the minima of candidate cells, from a guess at the best distance: most often not less than the
// limit of the certificate.  A NaN where brute force has to decide.
float BlockSearch::first_limit(int64_t q, float least) const {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  if (!(norms_[q] <= kMaxNorm)) return kNone;
  float known = std::numeric_limits<float>::infinity();
  if (keys_[q] != kNoKey) {
    const float distance = distance_of(keys_[q]);
    if (distance < 0) known = -known;  // a NaN of another run: no code of this run comes before it
    if (distance >= 0 && distance <= kMaxDistance) known = limit(distance, q);
  }
  if (least > known) return known;
  if (least >= (rounded_ ? static_cast<float>(kExcludedWord) : kOutlier)) return kNone;
  return std::min(known, std::max(least, guess(least, q)));
}

// Finds the cells that may hold the winner, and prefetches their rows.  A cell of padding alone is not among them: its
// minimum is above every limit.
void BlockSearch::find(CodeRows codes, const float* minima, int64_t count, Candidates& found) const {
  if (std::isnan(found.limit)) {
    found.count = kMaxCells + 1;
    return;
  }
  found.count = found.least > found.limit ? 0 : kernels_.at_most(minima, count, found.limit, found.cells, kMaxCells);
  for (int64_t i = 0; i < std::min(found.count, kMaxCells); ++i) {
    const int64_t begin = found.cells[i] * plan_.cell;
    const float* rows = codes.rows + begin * codes.stride;
    const int64_t size =
        std::min((std::min(plan_.cell, codes.count - begin) - 1) * codes.stride + plan_.d, kPrefetchedElements);
    for (int64_t j = 0; j < size; j += 16) __builtin_prefetch(rows + j);
  }
}

// Appends the candidate cells to those whose exact distances are to be computed.  Their elements are not NaN.
void BlockSearch::add_pending(int64_t q, CodeRows codes, int64_t first, const Candidates& found) {
  if (found.count > kMaxCells) return;
  counters_.cells += found.count;
  const float* x = queries_ + q * plan_.d;
  for (int64_t i = 0; i < found.count; ++i) {
    const int64_t begin = found.cells[i] * plan_.cell, count = std::min(plan_.cell, codes.count - begin);
    pending_[num_pending_] = {x, {codes.rows + begin * codes.stride, codes.stride, count}};
    pending_places_[num_pending_++] = {q, first + begin};
    if (num_pending_ == kMaxPendingCells) evaluate_pending();
  }
}

void BlockSearch::evaluate_pending() {
  int64_t keys[kMaxPendingCells];
  kernels_.nearest_of_each(pending_, num_pending_, plan_.cell, plan_.d, keys);
  for (int64_t i = 0; i < num_pending_; ++i) {
    int64_t& key = keys_[pending_places_[i].query];
    key = std::min(key, keys[i] + pending_places_[i].code);
  }
  num_pending_ = 0;
}

// Whether the cells evaluated so far, and those added here, are all that the certificate asks for; false when brute force
// has to decide.
bool BlockSearch::check(int64_t q, CodeRows codes, int64_t first, const float* minima, int64_t count,
                        Candidates& found) {
  if (found.count > kMaxCells) return false;
  if (found.count == 0) return true;
  const float distance = distance_of(keys_[q]);
  if (!(distance <= kMaxDistance)) return false;
  const float most = limit(distance, q);
  if (most <= found.limit) return true;
  found.count = kernels_.at_most(minima, count, most, found.cells, kMaxCells);
  add_pending(q, codes, first, found);
  evaluate_pending();
  return found.count <= kMaxCells;
}

}  // namespace revq
