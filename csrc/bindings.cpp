// The operators as torch sees them, through torch's stable ABI: one binary for every torch from 2.10 on.
//
//     rwkvir::wkv           forward: y, and the states that enter each chunk, kept for the gradients
//     rwkvir::wkv_backward  gradients of w, u, k and v
//
// w, u: (S, C) with S = 1 (row-major token order) or S = 2 (the sum over the row-major and the column-major order);
// k, v: (B, H, W, C), any strides. Shapes are checked in rwkvir_arch/bi_wkv.py, which also registers the fake
// implementations and the autograd formula.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdlib>
#include <string>
#include <tuple>

#include "bi_wkv_scan.h"

#ifdef WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <dlfcn.h>

#include "bi_wkv_cuda.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

wkv::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return wkv::DType::kFloat;
    case ScalarType::Double:
      return wkv::DType::kDouble;
    case ScalarType::Half:
      return wkv::DType::kHalf;
    case ScalarType::BFloat16:
      return wkv::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "bi_wkv takes float32, float64, bfloat16 or float16");
  }
}

// A (B, H, W, C) tensor in row-major token order, or in column-major order with the middle strides exchanged.
wkv::View view_of(const Tensor& t, bool columns) {
  const auto stride = t.strides();
  return {t.data_ptr(), dtype_of(t), stride[0], stride[columns ? 2 : 1], stride[columns ? 1 : 2], stride[3]};
}

Tensor as_double(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Double)); }

bool is_16_bit(const Tensor& t) { return t.element_size() == 2; }

// Where two scans are summed, 16-bit outputs are summed in float32 and rounded once.
Tensor output_like(const Tensor& t, bool sum) {
  return sum && is_16_bit(t) ? torch::stable::new_empty(t, t.sizes(), ScalarType::Float) : torch::stable::empty_like(t);
}

Tensor rounded_like(const Tensor& t, const Tensor& out) {
  if (out.scalar_type() == t.scalar_type()) return out;
  Tensor result = torch::stable::empty_like(t);
  return torch::stable::copy_(result, out);
}

struct Problem {
  int64_t scans, B, H, W, C;
  Tensor w, u, k, v;

  Problem(const Tensor& w_, const Tensor& u_, const Tensor& k_, const Tensor& v_)
      : w(as_double(w_)), u(as_double(u_)), k(k_), v(v_) {
    STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && w.dim() == 2 && u.dim() == 2,
                    "wkv takes w, u (S, C); k, v (B, H, W, C)");
    scans = w.sizes()[0];
    B = k.sizes()[0], H = k.sizes()[1], W = k.sizes()[2], C = k.sizes()[3];
    STD_TORCH_CHECK((scans == 1 || scans == 2) && u.sizes()[0] == scans, "wkv takes one or two scans");
    STD_TORCH_CHECK(w.sizes()[1] == C && u.sizes()[1] == C, "w and u must have as many channels as k");
    for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(v.sizes()[i] == k.sizes()[i], "k and v must have one shape");
    STD_TORCH_CHECK(k.scalar_type() == v.scalar_type(), "k and v must have one dtype");
  }

  bool empty() const { return B * H * W * C == 0; }

  wkv::Scan scan(int64_t index) const {
    const bool columns = index == 1;
    wkv::Scan s = {};
    s.B = B, s.outer = columns ? W : H, s.inner = columns ? H : W, s.C = C;
    s.w = static_cast<const double*>(w.data_ptr()) + index * C;
    s.u = static_cast<const double*>(u.data_ptr()) + index * C;
    s.k = view_of(k, columns);
    s.v = view_of(v, columns);
    s.accumulate = columns;
    return s;
  }

  // (3, lanes), float
  Tensor new_rates() const {
    const std::array<int64_t, 2> size = {3, wkv::padded_channels(scan(0))};
    return torch::stable::new_empty(k, {size.data(), size.size()}, ScalarType::Float);
  }

  // (S, B, chunks, 6, lanes), double; zero where rows have lanes beyond C, which not every kernel writes.
  Tensor new_state() const {
    const wkv::Scan s = scan(0);
    const std::array<int64_t, 5> size = {scans, B, wkv::chunks(s), 6, wkv::padded_channels(s)};
    if (size[4] != C) return torch::stable::new_zeros(k, {size.data(), size.size()}, ScalarType::Double);
    return torch::stable::new_empty(k, {size.data(), size.size()}, ScalarType::Double);
  }

  // (B * chunks, 2, lanes), double
  Tensor new_partial() const {
    const wkv::Scan s = scan(0);
    const std::array<int64_t, 3> size = {B * wkv::chunks(s), 2, wkv::padded_channels(s)};
    return torch::stable::new_empty(k, {size.data(), size.size()}, ScalarType::Double);
  }
};

double* scan_rows(const Tensor& t, int64_t index) {
  return static_cast<double*>(t.data_ptr()) + index * t.strides()[0];
}

const wkv::CpuKernel& kernel() {
  static const wkv::CpuKernel* const chosen = [] {
    const char* name = std::getenv("RWKVIR_CPU");
    const wkv::CpuKernel* k = wkv::cpu_kernel(name);
    STD_TORCH_CHECK(k != nullptr, "RWKVIR_CPU=", name,
                    " is not a kernel this processor runs; unset it or set it to plain");
    return k;
  }();
  return *chosen;
}

// Runs the phases of one scan on the CPU, over torch's threads.
struct CpuRun {
  static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

  const wkv::CpuKernel& cpu = kernel();
  Tensor rates;
  wkv::Scan s;
  int64_t items, lines;

  CpuRun(const Problem& p, wkv::Scan scan) : rates(p.new_rates()), s(scan) {
    s.rates = static_cast<float*>(rates.data_ptr());
    lines = s.B * wkv::channel_groups(s, wkv::kLanes);
    items = s.B * wkv::chunks(s) * wkv::channel_groups(s, cpu.width);
    cpu.prepare(s);
  }
  void phase(void (*f)(const wkv::Scan&, int64_t, int64_t)) const {
    const int64_t grain = kGrain / (wkv::kChunkTokens * cpu.width);
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { f(s, begin, end); });
  }
  void carry(double* state) const {
    torch::stable::parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) { cpu.carry(s, state, begin, end); });
  }
  void reduce(double* gw, double* gu) const {
    torch::stable::parallel_for(0, s.C, 16, [&](int64_t begin, int64_t end) { cpu.reduce(s, gw, gu, begin, end); });
  }
};

// The scan of the forward pass of `index`, with its outputs.
wkv::Scan forward_scan(const Problem& p, int64_t index, const Tensor& y, const Tensor& state) {
  wkv::Scan s = p.scan(index);
  s.y = view_of(y, index == 1);
  s.state = scan_rows(state, index);
  return s;
}

std::tuple<Tensor, Tensor> wkv_cpu(Tensor w, Tensor u, Tensor k, Tensor v) {
  const Problem p(w, u, k, v);
  Tensor y = output_like(k, p.scans > 1), state = p.new_state();
  for (int64_t i = 0; i < p.scans && !p.empty(); ++i) {
    const CpuRun run(p, forward_scan(p, i, y, state));
    run.phase(run.cpu.summary);
    run.carry(run.s.state);
    run.phase(run.cpu.emit);
  }
  return {rounded_like(k, y), state};
}

// The tensors of the backward pass, and its scans.
struct Gradients {
  Tensor gy, gw, gu, gk, gv, state, gstate, partial;

  Gradients(const Problem& p, const Tensor& gy_, const Tensor& state_)
      : gy(gy_),
        gw(torch::stable::new_zeros(p.w, p.w.sizes())),
        gu(torch::stable::new_zeros(p.u, p.u.sizes())),
        gk(output_like(p.k, p.scans > 1)),
        gv(output_like(p.v, p.scans > 1)),
        state(state_),
        gstate(p.new_state()),
        partial(p.new_partial()) {}

  wkv::Scan scan(const Problem& p, int64_t index) const {
    wkv::Scan s = p.scan(index);
    s.gy = view_of(gy, index == 1);
    s.gk = view_of(gk, index == 1);
    s.gv = view_of(gv, index == 1);
    s.state = scan_rows(state, index);
    s.gstate = scan_rows(gstate, index);
    s.partial = static_cast<double*>(partial.data_ptr());
    return s;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> result(const Tensor& w, const Tensor& u, const Tensor& k,
                                                    const Tensor& v) const {
    return {torch::stable::to(gw, w.scalar_type()), torch::stable::to(gu, u.scalar_type()), rounded_like(k, gk),
            rounded_like(v, gv)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv_backward_cpu(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v,
                                                            Tensor state) {
  const Problem p(w, u, k, v);
  const Gradients gradients(p, gy, state);
  for (int64_t i = 0; i < p.scans && !p.empty(); ++i) {
    const CpuRun run(p, gradients.scan(p, i));
    run.phase(run.cpu.backward_summary);
    run.carry(run.s.gstate);
    run.phase(run.cpu.backward_emit);
    run.reduce(scan_rows(gradients.gw, i), scan_rows(gradients.gu, i));
  }
  return gradients.result(w, u, k, v);
}

#ifdef WITH_CUDA

// Looked up when it is first needed: linked in, it would keep the library from loading beside a CPU build of torch.
void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(found != nullptr, "this torch has no CUDA streams: ", dlerror());
    return reinterpret_cast<GetStream>(found);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch does not tell the current CUDA stream");
  return stream;
}

void check_cuda(const char* error) { STD_TORCH_CHECK(error == nullptr, "bi_wkv on CUDA: ", error); }

Tensor new_flags(const Problem& p) {
  const int64_t count = wkv::cuda_flag_count(p.scan(0));
  return torch::stable::new_empty(p.k, {&count, 1}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> wkv_cuda(Tensor w, Tensor u, Tensor k, Tensor v) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const Problem p(w, u, k, v);
  Tensor y = output_like(k, p.scans > 1), state = p.new_state(), flags = new_flags(p);
  for (int64_t i = 0; i < p.scans && !p.empty(); ++i) {
    check_cuda(wkv::cuda_forward(forward_scan(p, i, y, state), static_cast<unsigned char*>(flags.data_ptr()),
                                 current_stream(k.get_device_index())));
  }
  return {rounded_like(k, y), state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv_backward_cuda(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v,
                                                             Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const Problem p(w, u, k, v);
  const Gradients gradients(p, gy, state);
  Tensor flags = new_flags(p);
  for (int64_t i = 0; i < p.scans && !p.empty(); ++i) {
    check_cuda(wkv::cuda_backward(gradients.scan(p, i), static_cast<unsigned char*>(flags.data_ptr()),
                                  scan_rows(gradients.gw, i), scan_rows(gradients.gu, i),
                                  current_stream(k.get_device_index())));
  }
  return gradients.result(w, u, k, v);
}

#endif

// What was built and what runs, for `basicsr info`: "cpu=avx2 cuda=13000", cuda=0 for a build without it.
std::string build_info() {
#ifdef WITH_CUDA
  const int cuda = wkv::cuda_version();
#else
  const int cuda = 0;
#endif
  return std::string("cpu=") + kernel().name + " cuda=" + std::to_string(cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY(rwkvir, m) {
  m.def("wkv(Tensor w, Tensor u, Tensor k, Tensor v) -> (Tensor y, Tensor state)");
  m.def(
      "wkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor state)"
      " -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvir, CPU, m) {
  m.impl("wkv", TORCH_BOX(&wkv_cpu));
  m.impl("wkv_backward", TORCH_BOX(&wkv_backward_cpu));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rwkvir, CUDA, m) {
  m.impl("wkv", TORCH_BOX(&wkv_cuda));
  m.impl("wkv_backward", TORCH_BOX(&wkv_backward_cuda));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(rwkvir, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
