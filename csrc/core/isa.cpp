// Asks the processor once, feature by feature: compilers differ in the names that they have for architecture levels.
#include "core/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace revq {
namespace {

#if defined(__x86_64__)
// Bits of the register ecx of a cpuid leaf: features that clang 14 has no name for.
bool cpuid_ecx(unsigned leaf, unsigned bits) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(leaf, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bits) == bits;
}
#endif

#if REVQ_X86_CLONES
// The names of AVX and AVX-512 cover the operating system too: it has to save the registers.
bool has_v3() {
  constexpr unsigned kMovbe = 1u << 22, kLzcnt = 1u << 5;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") && cpu_has_f16c() && cpuid_ecx(1, kMovbe) &&
         cpuid_ecx(0x80000001, kLzcnt);
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

bool cpu_has_f16c() {
#if defined(__x86_64__)
  constexpr unsigned kF16c = 1u << 29;
  static const bool has = __builtin_cpu_supports("avx") && cpuid_ecx(1, kF16c);
  return has;
#else
  return false;
#endif
}

int cpu_isa() {
#if REVQ_X86_CLONES
  static const int isa = !has_v3() ? 0 : !has_v4() ? 1 : !__builtin_cpu_supports("avx512vnni") ? 2 : 3;
  return isa;
#else
  return 0;
#endif
}

}  // namespace revq
