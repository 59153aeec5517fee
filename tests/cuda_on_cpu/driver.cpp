// What test_cuda_emulated.py calls. Every function returns null, or what went wrong.

#include <cuda_runtime.h>

#include "bi_wkv_cuda.h"

namespace {

void skips_a_barrier() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

void parts_at_barriers() {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

const char* run(void (*kernel)()) {
  cuda_on_cpu::launch(1, 8, 0, nullptr, kernel);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int64_t scan_size() { return sizeof(wkv::Scan); }
int64_t flag_count(const wkv::Scan* scans, int count) { return wkv::cuda_flag_count(scans, count); }

const char* forward(const wkv::Scan* scans, int count, unsigned char* unsafe) {
  return wkv::cuda_forward(scans, count, unsafe, nullptr);
}

const char* backward(const wkv::Scan* scans, int count, unsigned char* unsafe, double* gw, double* gu) {
  return wkv::cuda_backward(scans, count, unsafe, gw, gu, nullptr);
}

const char* skip_a_barrier() { return run(skips_a_barrier); }
const char* part_at_barriers() { return run(parts_at_barriers); }
}
