// The digest of one piece of a codebook, compiled once per instruction set; what it is stands in index_hash.cpp.

void index_hash(const uint32_t* words, const uint32_t* keys, uint64_t* digest) {
  const char* message = reinterpret_cast<const char*>(words);
#if REVQ_WALK_ISA == 2
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t i = 0; i < 4 * kHashWords; i += 64) {
    const __m512i m = _mm512_loadu_si512(message + i);
    for (int k = 0; k < 4; ++k) {
      const char* key = reinterpret_cast<const char*>(keys + k * kHashWords) + i;
      const __m512i p = _mm512_add_epi32(m, _mm512_loadu_si512(key));
      sum[k] = _mm512_add_epi64(sum[k], _mm512_mul_epu32(p, _mm512_srli_epi64(p, 32)));
    }
  }
  for (int k = 0; k < 4; ++k) digest[k] = _mm512_reduce_add_epi64(sum[k]);
#elif REVQ_WALK_ISA == 1
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t i = 0; i < 4 * kHashWords; i += 32) {
    const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(message + i));
    for (int k = 0; k < 4; ++k) {
      const char* key = reinterpret_cast<const char*>(keys + k * kHashWords) + i;
      const __m256i p = _mm256_add_epi32(m, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
      sum[k] = _mm256_add_epi64(sum[k], _mm256_mul_epu32(p, _mm256_srli_epi64(p, 32)));
    }
  }
  for (int k = 0; k < 4; ++k) {
    uint64_t part[4];
    __builtin_memcpy(part, &sum[k], sizeof part);
    digest[k] = part[0] + part[1] + part[2] + part[3];
  }
#else
  for (int k = 0; k < 4; ++k) {
    const uint32_t* key = keys + k * kHashWords;
    uint64_t sum = 0;
    for (int64_t i = 0; i < kHashWords; i += 2) {
      uint32_t m[2];
      __builtin_memcpy(m, message + 4 * i, sizeof m);
      sum += static_cast<uint64_t>(m[0] + key[i]) * static_cast<uint32_t>(m[1] + key[i + 1]);
    }
    digest[k] = sum;
  }
#endif
}

#undef REVQ_INLINE
