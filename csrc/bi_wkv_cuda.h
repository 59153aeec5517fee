// The CUDA kernels as the bindings see them. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "bi_wkv_scan.h"

namespace wkv {

// Bytes that mark, per chunk and 32 channels, where the exact kernels have to follow; memory for `unsafe` below.
int64_t cuda_flag_count(const Scan& s);

// Null, or what CUDA says went wrong. The scan's pointers are device memory, `unsafe` too; everything runs on `stream`.
const char* cuda_forward(const Scan& s, unsigned char* unsafe, void* stream);
const char* cuda_backward(const Scan& s, unsigned char* unsafe, double* gw, double* gu, void* stream);

// The toolkit this was built with, as CUDART_VERSION.
int cuda_version();

}  // namespace wkv
