// The multiply-add peak of a CPU: independent chains of multiply-adds in registers, in every thread.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

typedef float Vector __attribute__((vector_size(64)));
constexpr int kChains = 12;

template <class Work>
void in_threads(int64_t threads, Work work) {
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(int64_t{0});
  for (auto& other : others) other.join();
}

}  // namespace

// Multiply-adds in independent chains, `steps` for each thread; returns the floating point operations done.
extern "C" double fma_work(int64_t threads, int64_t steps) {
  std::vector<float> sink(threads);
  in_threads(threads, [&](int64_t t) {
    Vector chain[kChains];
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chain[c] = Vector{} + float(c + t);
    Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) {
#if defined(__AVX512F__)
        asm("vfmadd213ps %2, %1, %0" : "+v"(chain[c]) : "v"(factor), "v"(term));
#else
        for (int lane = 0; lane < 16; ++lane) chain[c][lane] = __builtin_fmaf(chain[c][lane], factor[lane], term[lane]);
#endif
      }
    }
    // constant subscripts keep the chains in registers; variable ones would put them in memory
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sink[t] += chain[c][0];
  });
  double total = 0;
  for (float value : sink) total += value;
  return 2.0 * 16 * kChains * double(steps) * double(threads) + total * 0;
}
