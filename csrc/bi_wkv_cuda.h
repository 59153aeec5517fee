// The CUDA kernels as the bindings see them. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "bi_wkv_scan.h"

namespace wkv {

// Bytes that mark, per scan, chunk and channel, where the exact kernels have to follow; memory for `unsafe` below.
int64_t cuda_flag_count(const Scan* scans, int count);

// One or two scans of the same tensors, not empty, whose outputs are summed: the second accumulates.
// Returns null, or what CUDA says went wrong. All pointers are device memory; everything runs on `stream`, and nothing
// is allocated or waited for. gw, gu: (count, C).
const char* cuda_forward(const Scan* scans, int count, unsigned char* unsafe, void* stream);
const char* cuda_backward(const Scan* scans, int count, unsigned char* unsafe, double* gw, double* gu, void* stream);

// The toolkit this was built with, as CUDART_VERSION.
int cuda_version();

}  // namespace wkv
