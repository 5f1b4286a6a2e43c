// Which instruction sets this build has kernels for, and which of them the processor runs.
//
// A clone is one compilation of the kernels for one instruction set: a translation unit of cpu/clones/, in a namespace
// of its own.
#pragma once

// Both compilers know the x86-64 architecture levels by name from these versions on.  Elsewhere the baseline runs.
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 12))
#define REVQ_X86_CLONES 1
#else
#define REVQ_X86_CLONES 0
#endif

namespace revq {

// The best clone that this processor runs: 0 baseline, 1 x86-64-v3 (AVX2), 2 x86-64-v4 (AVX-512), 3 x86-64-v4 with
// VNNI.  The processor also runs every clone below it.
int cpu_isa();

// Whether the processor converts float16 to float32 by itself.
bool cpu_has_f16c();

}  // namespace revq
