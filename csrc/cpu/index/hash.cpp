// A digest of a codebook's bytes, by which a search knows at the speed of reading that nobody has changed them.
//
// NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, 1999) of pieces of kHashWords words of 32 bits,
//
//     sum over i of ((m_2i + k_2i) mod 2^32) * ((m_2i+1 + k_2i+1) mod 2^32)   mod 2^64,
//
// maps two different pieces to one number with probability at most 2^-32 over the keys (their theorem 4.2), whatever
// the pieces are, so long as they do not depend on the keys.  Four independent keys make that 2^-128; a changed
// codebook has a changed piece, and every piece keeps a digest of its own, so 2^-128 bounds the chance that a change is
// missed.  The keys are drawn from the system once per process and leave it in no form but digests.
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "cpu/index/tree.h"
#include "core/parallel.h"

namespace revq {
namespace {

using Keys = std::array<uint32_t, 4 * kHashWords>;

const Keys& keys() {
  static const Keys drawn = [] {
    constexpr size_t kMost = 256;  // what getentropy gives at a time
    static_assert(sizeof(Keys) % kMost == 0);
    Keys keys;
    for (size_t i = 0; i < sizeof keys; i += kMost) {
      if (getentropy(reinterpret_cast<char*>(keys.data()) + i, kMost) != 0) throw std::runtime_error("no entropy");
    }
    return keys;
  }();
  return drawn;
}

constexpr int64_t kPiecesPerItem = 32;

}  // namespace

int64_t digest_rows(int64_t count) { return (count + kHashWords - 1) / kHashWords; }

void hash_codebook(const float* codebook, int64_t count, int64_t* digests) {
  const IndexHash hash = index_kernels(cpu_isa()).hash;
  const uint32_t* key = keys().data();
  const auto* words = reinterpret_cast<const uint32_t*>(codebook);
  const int64_t pieces = digest_rows(count), items = (pieces + kPiecesPerItem - 1) / kPiecesPerItem;
  share_work(items, [&](auto& next) {
    for (int64_t item; (item = next()) >= 0;) {
      for (int64_t piece = item * kPiecesPerItem; piece < std::min(pieces, (item + 1) * kPiecesPerItem); ++piece) {
        const int64_t first = piece * kHashWords, size = std::min(kHashWords, count - first);
        auto* digest = reinterpret_cast<uint64_t*>(digests + piece * 4);
        if (size == kHashWords) {
          hash(words + first, key, digest);
        } else {  // all codebooks of an index are as long: zeros may stand for what is not there
          uint32_t padded[kHashWords] = {};
          std::copy_n(words + first, size, padded);
          hash(padded, key, digest);
        }
      }
    }
  });
}

}  // namespace revq
