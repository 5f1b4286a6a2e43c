// Per run of codes: scores of all pairs, then per query the cells that the certificate cannot exclude, by D.
#include "cpu/search/block.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/search/key.h"

namespace revq {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int64_t kAlign = 16;  // floats
// Of a candidate cell's rows, at most this many numbers are fetched ahead.
constexpr int64_t kPrefetch = 512;
// With so many queries of a sweep unsettled, and so few codes for one that is a copy, copies are looked for.
constexpr size_t kManyUnsettled = 24;
constexpr int64_t kCodesPerCopy = 4;
// Places of the table of codes that are tried: bounds the time of codes that collide.
constexpr int kProbes = 8;

// Whole numbers need two numbers to a word, and enough queries to pay for the rounding; the scale of anything longer
// than this is far from float's limits.
constexpr int64_t kMinRoundedDim = 2, kMinRoundedQueries = 24;
constexpr double kMinLength = 0x1p-60;
// A scale leaves room for a next run with codes that are a little longer, which then keeps it.
constexpr double kRoom = 0.97;
// Beside a query's usual candidate cells, one D of a candidate costs as much as whole numbers save on so many scores; D
// over all codes is cheaper by the second factor.
constexpr int64_t kUsualCells = 3, kScoresPerDistance = 64, kDirectPerDistance = 8;

int64_t rows_of_words(int64_t d) { return divide_up(d, 2); }

// Any numbers that agree for codes with the same bits.
uint64_t hash_of(const float* row, int64_t d) {
  uint64_t sum = 0, factor = 0x9E3779B97F4A7C15;
  for (int64_t j = 0; j < d; ++j) {
    sum += (uint64_t{std::bit_cast<uint32_t>(row[j])} + 1) * factor;
    factor = factor * 0xD1342543DE82EF95 + 2;  // odd again
  }
  return sum ^ sum >> 32;
}

}  // namespace

BlockSearch::BlockSearch(const Plan& plan, float* workspace)
    : plan_(plan),
      pass_(first_pass(plan.isa)),
      rounded_pass_(plan.rounded && plan.d >= kMinRoundedDim ? rounded_pass(plan.isa) : nullptr),
      certificate_(plan.d, plan.certificate_scale),
      rounded_certificate_(plan.d, plan.certificate_scale),
      norms_(round_up(plan.queries, kQueriesPerPack)),
      squares_(norms_.size()),
      direct_(plan.isa, plan.d) {
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
  pass_->pack_queries(queries_, count, plan_.d, center, packed_, norms_.data());
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
      while (!settle_sweep(codes, first, tiles, begin, end)) unsettled_.resize(settled);  // once more, prepared better
    }
  }
  if (unsettled_.empty()) return;
  counters_.searched += static_cast<int64_t>(unsettled_.size());
  direct_.search(queries_, unsettled_, codes, first, keys_);
}

// One sweep.  False when it went badly and the next one will not: copies are left out now, or whole numbers given up.
// Each happens at most once for a run of codes.
bool BlockSearch::settle_sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end) {
  const Counters before = counters_;
  const size_t settled = unsettled_.size();
  sweep(codes, first, tiles, begin, end);
  const size_t unsettled = unsettled_.size() - settled;
  if (!copies_ && may_have_copies_ && unsettled >= kManyUnsettled) {
    exclude_copies(codes);
    if (copies_) return false;
  }
  if (!rounded_) return true;
  if (poor(before, unsettled, codes, end - begin)) {
    rounded_pass_ = nullptr;
    pack(codes, tiles);
    return false;
  }
  counters_.rounded += end - begin;
  return true;
}

// Panels of the run.  False when a code holds a NaN: it wins by the contract, wherever it stands, and no score tells
// where.
bool BlockSearch::pack(CodeRows codes, int64_t tiles) {
  const float largest = pass_->pack_codes(codes, plan_.d, center_, plan_.cell, tiles, panels_);
  if (std::isnan(largest)) return false;
  rounded_ = rounded_pass_ != nullptr && count_ >= kMinRoundedQueries && round(largest, tiles);
  if (copies_) exclude_copies(codes);
  return true;
}

// Panels and queries in whole numbers, as fine as 16 bits allow; false where the scale would leave float's range.
bool BlockSearch::round(float largest, int64_t tiles) {
  const double longest = std::max(longest_, std::sqrt(2.0 * largest));
  if (!(longest >= kMinLength)) return false;
  if (const double scaled = scale_ * longest; scaled > kMaxScaled || scaled < kMaxScaled / 2) {  // not the last run's
    scale_ = static_cast<float>(kRoom * kMaxScaled / longest);
    rounded_pass_->round_queries(packed_, count_, plan_.d, scale_, rounded_queries_, squares_.data());
  }
  rounded_pass_->round_codes(panels_, plan_.d, tiles * plan_.cell / kVectorsPerPanel, scale_);
  return true;
}

// Whether a sweep's candidates cost more than whole numbers save: a few vectors far from all others leave the others
// few of the 16 bits.
bool BlockSearch::poor(const Counters& before, size_t unsettled, CodeRows codes, int64_t queries) const {
  const int64_t cells = counters_.cells - before.cells, usual = kUsualCells * plan_.cell;
  const int64_t distances = cells * plan_.cell + static_cast<int64_t>(unsettled) * codes.count / kDirectPerDistance;
  return distances > queries * (usual + codes.count / kScoresPerDistance);
}

float BlockSearch::limit(double distance, int64_t q) const {
  if (!rounded_) return certificate_.limit(distance, norms_[q]);
  return rounded_certificate_.limit(certificate_.reach(distance, norms_[q]) * scale_, squares_[q]);
}

float BlockSearch::guess(float smallest, int64_t q) const {
  return rounded_ ? rounded_certificate_.guess(smallest, squares_[q]) : certificate_.guess(smallest, norms_[q]);
}

// A code with the bits of an earlier one has its distance and a higher number, and never wins: its score becomes
// that of a lane that can win for no query.  Else many copies of a winner would fill its list of candidates.
void BlockSearch::exclude_copies(CodeRows codes) {
  const int64_t d = plan_.d, rows = rounded_ ? rows_of_words(d) : d;
  const int64_t lanes = pass_->lanes, row = kVectorsPerPanel * lanes;
  // The word's bits are a quiet NaN's, which a copy keeps.
  const float excluded = rounded_ ? std::bit_cast<float>(kExcludedWord) : kExcluded;
  const auto places = std::bit_ceil(static_cast<uint64_t>(2 * codes.count));
  table_.assign(places, -1);
  int64_t found = 0;
  for (int64_t code = 0; code < codes.count; ++code) {
    const float* numbers = codes.rows + code * codes.stride;
    uint64_t place = hash_of(numbers, d) & (places - 1);
    for (int probe = 0; probe < kProbes; ++probe, place = (place + 1) & (places - 1)) {
      if (table_[place] < 0) {
        table_[place] = static_cast<int32_t>(code);
        break;
      }
      if (std::memcmp(numbers, codes.rows + table_[place] * codes.stride, d * sizeof(float)) != 0) continue;
      ++found;
      const int64_t i = code % plan_.cell, lane = code / plan_.cell % lanes;
      float* panel = panels_ + (code / plan_.codes_per_tile() * plan_.cell + i) / kVectorsPerPanel * (rows + 1) * row;
      panel += i % kVectorsPerPanel * lanes + lane;
      for (int64_t j = 0; j <= rows; ++j) panel[j * row] = j == 0 ? excluded : 0.0f;
      break;
    }
  }
  copies_ = may_have_copies_ = found * kCodesPerCopy >= codes.count;
}

// Scores of some queries, then their candidates while the minima are in the cache.  What one query needs is a chain, each
// step of which waits for the last one; so every step is taken for many queries, whose steps overlap.
void BlockSearch::sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end) {
  const int64_t cells = tiles * pass_->lanes, stride = plan_.minima_stride();
  const int64_t rows = rounded_ ? rows_of_words(plan_.d) : plan_.d;
  const float* queries = (rounded_ ? rounded_queries_ : packed_) + begin * rows;
  (rounded_ ? rounded_pass_->score : pass_->score)({queries, end - begin, rows, panels_, tiles, plan_.cell, minima_, stride});
  for (int64_t some = begin; some < end; some += kAhead) {
    const int64_t last = std::min(some + kAhead, end);
    const auto minima = [&](int64_t q) { return minima_ + (q - begin) * stride; };
    const auto found = [&](int64_t q) -> Candidates& { return candidates_[q - some]; };
    for (int64_t q = some; q < last; ++q) found(q).least = pass_->smallest(minima(q), cells);
    for (int64_t q = some; q < last; ++q) found(q).limit = first_limit(q, found(q).least);
    for (int64_t q = some; q < last; ++q) find(codes, minima(q), cells, found(q));
    for (int64_t q = some; q < last; ++q) settle(q, codes, first, found(q));
    evaluate();
    for (int64_t q = some; q < last; ++q) {
      if (!check(q, codes, first, minima(q), cells, found(q))) unsettled_.push_back(q);
    }
  }
}

// What the minima of candidate cells are compared with, by a guess at the best distance: likely no less than the
// certificate's limit.  A NaN where D over all codes has to decide.
float BlockSearch::first_limit(int64_t q, float least) const {
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  if (!(norms_[q] <= kMaxNorm)) return kNone;
  float known = std::numeric_limits<float>::infinity();
  if (keys_[q] != kNoKey) {
    const float distance = distance_of(keys_[q]);
    if (distance < 0) known = -known;  // a NaN of another run: none here can come before it
    if (distance >= 0 && distance <= kMaxDistance) known = limit(distance, q);
  }
  if (least > known) return known;
  if (least >= (rounded_ ? static_cast<float>(kExcludedWord) : kOutlier)) return kNone;
  return std::min(known, std::max(least, guess(least, q)));
}

// The cells that may hold the winner, and their rows on the way to the cache.  A cell of padding alone is not among them:
// its minimum is above every limit.
void BlockSearch::find(CodeRows codes, const float* minima, int64_t count, Candidates& found) const {
  if (std::isnan(found.limit)) {
    found.count = kMaxCells + 1;
    return;
  }
  found.count = found.least > found.limit ? 0 : pass_->at_most(minima, count, found.limit, found.cells, kMaxCells);
  for (int64_t i = 0; i < std::min(found.count, kMaxCells); ++i) {
    const int64_t begin = found.cells[i] * plan_.cell;
    const float* rows = codes.rows + begin * codes.stride;
    const int64_t size = std::min((std::min(plan_.cell, codes.count - begin) - 1) * codes.stride + plan_.d, kPrefetch);
    for (int64_t j = 0; j < size; j += 16) __builtin_prefetch(rows + j);
  }
}

// The candidate cells wait for D.  Their numbers are finite or infinite.
void BlockSearch::settle(int64_t q, CodeRows codes, int64_t first, const Candidates& found) {
  if (found.count > kMaxCells) return;
  counters_.cells += found.count;
  const float* x = queries_ + q * plan_.d;
  for (int64_t i = 0; i < found.count; ++i) {
    const int64_t begin = found.cells[i] * plan_.cell, count = std::min(plan_.cell, codes.count - begin);
    waiting_[num_waiting_] = {x, {codes.rows + begin * codes.stride, codes.stride, count}};
    places_[num_waiting_++] = {q, first + begin};
    if (num_waiting_ == kMaxWaiting) evaluate();
  }
}

void BlockSearch::evaluate() {
  int64_t keys[kMaxWaiting];
  pass_->nearest_of_each(waiting_, num_waiting_, plan_.cell, plan_.d, keys);
  for (int64_t i = 0; i < num_waiting_; ++i) {
    int64_t& key = keys_[places_[i].query];
    key = std::min(key, keys[i] + places_[i].code);
  }
  num_waiting_ = 0;
}

// Whether the cells that were settled are all that the certificate asks for; false when D over all codes has to decide.
bool BlockSearch::check(int64_t q, CodeRows codes, int64_t first, const float* minima, int64_t count,
                        Candidates& found) {
  if (found.count > kMaxCells) return false;
  if (found.count == 0) return true;
  const float distance = distance_of(keys_[q]);
  if (!(distance <= kMaxDistance)) return false;
  const float most = limit(distance, q);
  if (most <= found.limit) return true;
  found.count = pass_->at_most(minima, count, most, found.cells, kMaxCells);
  settle(q, codes, first, found);
  evaluate();
  return found.count <= kMaxCells;
}

}  // namespace revq
