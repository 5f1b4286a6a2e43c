// Which clone of the kernels runs: decided once, by what the processor says it has.
#include "cpu/search/kernels.h"
#include "cpu/search/exact.h"

namespace revq {

int cpu_isa() {
#if REVQ_X86_CLONES
  static const int isa = __builtin_cpu_supports("x86-64-v4")   ? __builtin_cpu_supports("avx512vnni") ? 3 : 2
                         : __builtin_cpu_supports("x86-64-v3") ? 1
                                                               : 0;
  return isa;
#else
  return 0;
#endif
}

SearchTile search_tile(int isa) {
  if (isa == 0) return baseline::search_tile;
#if REVQ_X86_CLONES
  if (isa == 1) return x86_64_v3::search_tile;
  if (isa == 2 || isa == 3) return x86_64_v4::search_tile;
#endif
  return nullptr;
}

const FirstPass* first_pass(int isa) {
  if (isa == 0) return &baseline::first_pass;
#if REVQ_X86_CLONES
  if (isa == 1) return &x86_64_v3::first_pass;
  if (isa == 2 || isa == 3) return &x86_64_v4::first_pass;
#endif
  return nullptr;
}

// AVX-512 without VNNI multiplies and adds in two instructions, as many as two fused multiply-adds are.
const RoundedPass* rounded_pass(int isa) {
#if REVQ_X86_CLONES
  if (isa == 1) return &x86_64_v3::rounded_pass;
  if (isa == 3) return &x86_64_v4_vnni::rounded_pass;
#endif
  return nullptr;
}

}  // namespace revq
