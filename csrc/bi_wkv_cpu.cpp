// Bidirectional WKV on the CPU. The kernel is compiled once per instruction set and chosen when the program runs, so
// that one binary serves every machine.

#include "bi_wkv_scan.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define WKV_FN inline __attribute__((always_inline))
#define WKV_NOINLINE __attribute__((noinline))

#if defined(__clang__)
#define WKV_PRAGMA(text) _Pragma(#text)
#define WKV_TARGET_BEGIN(isa) WKV_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define WKV_TARGET_END _Pragma("clang attribute pop")
#else
#pragma GCC diagnostic ignored \
    "-Wpsabi"  // vectors wider than the base instruction set only pass between inlined functions
#define WKV_PRAGMA(text) _Pragma(#text)
#define WKV_TARGET_BEGIN(isa) _Pragma("GCC push_options") WKV_PRAGMA(GCC target(isa))
#define WKV_TARGET_END _Pragma("GCC pop_options")
#endif

#define WKV_NAMESPACE wkv::plain
#define WKV_WIDTH 4
#include "bi_wkv_cpu_kernel.h"
#undef WKV_NAMESPACE
#undef WKV_WIDTH

// prfchw: where it is missing the processor passes over its one instruction, a prefetch.
#if defined(__x86_64__)
WKV_TARGET_BEGIN("avx2,fma,prfchw")
#define WKV_NAMESPACE wkv::avx2
#define WKV_WIDTH 8
#include "bi_wkv_cpu_kernel.h"
#undef WKV_NAMESPACE
#undef WKV_WIDTH
WKV_TARGET_END

WKV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,prfchw")
#define WKV_NAMESPACE wkv::avx512
#define WKV_WIDTH 16
#include "bi_wkv_cpu_kernel.h"
#undef WKV_NAMESPACE
#undef WKV_WIDTH
WKV_TARGET_END
#endif

namespace wkv {

#define WKV_KERNEL(isa)                                                                           \
  {#isa,       isa::prepare, isa::reference_items,  isa::refer,         isa::items, isa::summary, \
   isa::carry, isa::emit,    isa::backward_summary, isa::backward_emit, isa::reduce}

const CpuKernel* cpu_kernel(const char* name) {
  static const CpuKernel plain_kernel = WKV_KERNEL(plain);
#if defined(__x86_64__)
  static const CpuKernel avx2_kernel = WKV_KERNEL(avx2), avx512_kernel = WKV_KERNEL(avx512);
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name == nullptr || std::strcmp(name, "avx512") == 0)) return &avx512_kernel;
  if (has_avx2 && (name == nullptr || std::strcmp(name, "avx2") == 0)) return &avx2_kernel;
#endif
  return name == nullptr || std::strcmp(name, "plain") == 0 ? &plain_kernel : nullptr;
}

}  // namespace wkv
