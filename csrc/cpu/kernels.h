// The clones: the kernels of every instruction set that this build has, and the one place that lists them.
#pragma once

#include "core/isa.h"
#include "cpu/index/kernels.h"
#include "cpu/search/kernels.h"

namespace revq {

namespace baseline {
extern const SearchKernels search_kernels;
extern const TreeKernels tree_kernels;
}  // namespace baseline

#if REVQ_X86_CLONES
namespace x86_64_v3 {
extern const SearchKernels search_kernels;
extern const Int16Kernels int16_kernels;
extern const TreeKernels tree_kernels;
}  // namespace x86_64_v3

namespace x86_64_v4 {
extern const SearchKernels search_kernels;
extern const TreeKernels tree_kernels;
}  // namespace x86_64_v4

namespace x86_64_v4_vnni {
extern const Int16Kernels int16_kernels;
}  // namespace x86_64_v4_vnni
#endif

struct Kernels {
  const SearchKernels* search = nullptr;
  const Int16Kernels* int16 = nullptr;  // nullptr where float32 is as fast
  const TreeKernels* tree = nullptr;
};

// The kernels for an instruction set as cpu_isa() numbers them; nullptr in all places when this build has none.
inline Kernels kernels(int isa) {
  switch (isa) {
    case 0: return {&baseline::search_kernels, nullptr, &baseline::tree_kernels};
#if REVQ_X86_CLONES
    case 1: return {&x86_64_v3::search_kernels, &x86_64_v3::int16_kernels, &x86_64_v3::tree_kernels};
    // Without VNNI, AVX-512 multiplies and adds int16 in two instructions, which do no more than two fused multiply-adds.
    case 2: return {&x86_64_v4::search_kernels, nullptr, &x86_64_v4::tree_kernels};
    case 3: return {&x86_64_v4::search_kernels, &x86_64_v4_vnni::int16_kernels, &x86_64_v4::tree_kernels};
#endif
    default: return {};
  }
}

}  // namespace revq
