// Keeps denormals during the life of an object: exact distances need them, whatever torch.set_flush_denormal says.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace revq {

class KeepDenormals {
 public:
#if defined(__SSE__)
  KeepDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero)); }
  ~KeepDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~kFlushToZero));
  }
  ~KeepDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
#error "this processor needs its own way to keep denormals: the exactness contract depends on it"
#endif
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
#if defined(__SSE__)
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#else
  static constexpr unsigned long kFlushToZero = 1ul << 24;
  unsigned long saved_;
#endif
};

}  // namespace revq
