// The operators as torch sees them, through torch's stable ABI: one binary for every torch from 2.10 on.
//
//     rwkvir::wkv           forward: y, and the states that enter each chunk, kept for the gradients
//     rwkvir::wkv_backward  gradients of w, u, k, v and the gate
//
// w, u: (S, C) with S = 1 (row-major token order) or S = 2 (the sum over the row-major and the column-major order);
// k, v, gate: (B, H, W, C), any strides; with a gate the result is sigmoid(gate) y. Shapes are checked in
// rwkvir_arch/bi_wkv.py, which also registers the fake implementations and the autograd formula.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "bi_wkv_scan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

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

struct Problem {
  int64_t scans, B, H, W, C;
  Tensor w, u, k, v;
  std::optional<Tensor> gate;

  Problem(const Tensor& w_, const Tensor& u_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& gate_)
      : w(as_double(w_)), u(as_double(u_)), k(k_), v(v_), gate(gate_) {
    STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && w.dim() == 2 && u.dim() == 2,
                    "wkv takes w, u (S, C); k, v (B, H, W, C)");
    scans = w.sizes()[0];
    B = k.sizes()[0], H = k.sizes()[1], W = k.sizes()[2], C = k.sizes()[3];
    STD_TORCH_CHECK((scans == 1 || scans == 2) && u.sizes()[0] == scans, "wkv takes one or two scans");
    STD_TORCH_CHECK(w.sizes()[1] == C && u.sizes()[1] == C, "w and u must have as many channels as k");
    check_like_k(v);
    if (gate) check_like_k(*gate);
  }

  void check_like_k(const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 4, "wkv takes v, gate and gy of k's shape");
    for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(x.sizes()[i] == k.sizes()[i], "wkv takes v, gate and gy of k's shape");
    STD_TORCH_CHECK(x.scalar_type() == k.scalar_type(), "wkv takes v, gate and gy of k's dtype");
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

  // (S, B, chunks, 6, lanes), double; zero where rows have lanes beyond C, which not every kernel writes.
  Tensor new_state() const {
    const wkv::Scan s = scan(0);
    const std::array<int64_t, 5> size = {scans, B, wkv::chunks(s), 6, wkv::padded_channels(s)};
    if (size[4] != C) return torch::stable::new_zeros(k, {size.data(), size.size()}, ScalarType::Double);
    return torch::stable::new_empty(k, {size.data(), size.size()}, ScalarType::Double);
  }

  // (S, B * chunks, 2, lanes), double
  Tensor new_partial() const {
    const wkv::Scan s = scan(0);
    const std::array<int64_t, 4> size = {scans, B * wkv::chunks(s), 2, wkv::padded_channels(s)};
    return torch::stable::new_empty(k, {size.data(), size.size()}, ScalarType::Double);
  }
};

double* scan_rows(const Tensor& t, int64_t index) {
  return static_cast<double*>(t.data_ptr()) + index * t.strides()[0];
}

// An output of t's shape. Memory of this size comes fresh from the system, which hands it out in pages of 4 KiB as they
// are written; that takes longer than to compute what is written there. So it is asked for large pages.
Tensor new_output(const Tensor& t) {
  Tensor result = torch::stable::empty_like(t);
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20, kFresh = 32 << 20;
  const uintptr_t size = static_cast<uintptr_t>(result.numel()) * result.element_size();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.data_ptr()), first = (begin + kPage - 1) / kPage * kPage;
  if (size >= kFresh) madvise(reinterpret_cast<void*>(first), (begin + size) / kPage * kPage - first, MADV_HUGEPAGE);
#endif
  return result;
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

// All scans of a problem on the CPU, phase by phase, over torch's threads.
struct CpuRun {
  static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

  const wkv::CpuKernel& cpu = kernel();
  const Problem& p;
  wkv::CpuJob job = {};
  int64_t lanes, tiles;
  Tensor rates, references;

  explicit CpuRun(const Problem& p_) : p(p_) {
    job.orders = static_cast<int>(p.scans);
    for (int i = 0; i < job.orders; ++i) job.scan[i] = p.scan(row(i));
    lanes = wkv::padded_channels(job.scan[0]);
    tiles = p.B * wkv::tile_rows(job) * wkv::tile_columns(job);
    rates = rows(4 * p.scans, ScalarType::Float);
    for (int i = 0; i < job.orders; ++i) {
      job.scan[i].rates = static_cast<float*>(rates.data_ptr()) + i * 4 * lanes;
      cpu.prepare(job.scan[i]);
    }
    references = rows(p.B, ScalarType::Double);
    job.references = static_cast<double*>(references.data_ptr());
    if (p.empty()) return;
    torch::stable::parallel_for(0, cpu.reference_items(job), 64,
                                [&](int64_t begin, int64_t end) { cpu.refer(job, begin, end); });
  }

  // A sum of two scans over an image of few rows is that of the transposed image: the kernels know of few columns.
  bool transposed() const { return p.scans == 2 && p.H <= wkv::kNarrow && p.H < p.W; }
  wkv::View view(const Tensor& t) const { return view_of(t, transposed()); }
  int64_t row(int i) const { return transposed() ? 1 - i : i; }  // of w and u

  Tensor rows(int64_t count, ScalarType dtype) const {
    const std::array<int64_t, 2> size = {count, lanes};
    return torch::stable::new_empty(p.k, {size.data(), size.size()}, dtype);
  }
  // (rows, lanes), double: the states of one scan after the other, then the tiles' scales.
  Tensor new_state() const {
    int64_t count = tiles;
    for (int i = 0; i < job.orders; ++i) count += 6 * p.B * wkv::line(job, i).count();
    return rows(count, ScalarType::Double);
  }

  // Lets the scans' `field` point into such a tensor; returns where the tiles' scales are.
  double* place(const Tensor& state, double* wkv::Scan::* field) {
    double* row = static_cast<double*>(state.data_ptr());
    for (int i = 0; i < job.orders; ++i) {
      job.scan[i].*field = row;
      row += 6 * p.B * wkv::line(job, i).count() * lanes;
    }
    return row;
  }

  void phase(void (*f)(const wkv::CpuJob&, int64_t, int64_t)) const {
    const int64_t items = cpu.items(job), elements = p.B * p.H * p.W * p.C;
    const int64_t grain = std::max<int64_t>(1, kGrain * items / elements);
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { f(job, begin, end); });
  }
  void carry(bool backward) const {
    const int64_t items = 2 * p.scans * p.B * lanes / wkv::kLanes;
    const int64_t grain = std::max<int64_t>(1, 1024 / (6 * wkv::line(job, 0).count()));
    torch::stable::parallel_for(0, items, grain,
                                [&](int64_t begin, int64_t end) { cpu.carry(job, backward, begin, end); });
  }
  void reduce(int i, double* gw, double* gu) const {
    torch::stable::parallel_for(0, p.C, 16,
                                [&](int64_t begin, int64_t end) { cpu.reduce(job, i, gw, gu, begin, end); });
  }
};

std::tuple<Tensor, Tensor> wkv_cpu(Tensor w, Tensor u, Tensor k, Tensor v, std::optional<Tensor> gate) {
  const Problem p(w, u, k, v, gate);
  CpuRun run(p);
  Tensor y = new_output(k), state = run.new_state();
  if (p.empty()) return {y, state};
  run.job.scan[0].y = run.view(y);
  if (gate) run.job.scan[0].gate = run.view(*gate);
  run.job.tops = run.place(state, &wkv::Scan::state);
  run.phase(run.cpu.summary);
  run.carry(false);
  run.phase(run.cpu.emit);
  return {y, state};
}

using GradientResults = std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>>;

GradientResults wkv_backward_cpu(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, std::optional<Tensor> gate,
                                 Tensor state) {
  const Problem p(w, u, k, v, gate);
  p.check_like_k(gy);
  CpuRun run(p);
  Tensor gw = torch::stable::new_zeros(p.w, p.w.sizes()), gu = torch::stable::new_zeros(p.u, p.u.sizes());
  Tensor gk = new_output(k), gv = new_output(v);
  std::optional<Tensor> ggate;
  if (gate) ggate = new_output(*gate);
  if (!p.empty()) {
    const Tensor gstate = run.new_state(), partial = run.rows(2 * p.scans * run.tiles, ScalarType::Double);
    wkv::Scan& s = run.job.scan[0];
    s.gy = run.view(gy), s.gk = run.view(gk), s.gv = run.view(gv);
    if (gate) s.gate = run.view(*gate), s.ggate = run.view(*ggate);
    run.job.tops = run.place(state, &wkv::Scan::state);
    run.place(gstate, &wkv::Scan::gstate);
    for (int i = 0; i < run.job.orders; ++i) {
      run.job.scan[i].partial = static_cast<double*>(partial.data_ptr()) + i * 2 * run.tiles * run.lanes;
    }
    run.phase(run.cpu.backward_summary);
    run.carry(true);
    run.phase(run.cpu.backward_emit);
    for (int i = 0; i < run.job.orders; ++i) run.reduce(i, scan_rows(gw, run.row(i)), scan_rows(gu, run.row(i)));
  }
  return {torch::stable::to(gw, w.scalar_type()), torch::stable::to(gu, u.scalar_type()), gk, gv, ggate};
}

#ifdef WITH_CUDA

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

// The scan of the forward pass of `index`, with its outputs.
wkv::Scan forward_scan(const Problem& p, int64_t index, const Tensor& y, const Tensor& state) {
  wkv::Scan s = p.scan(index);
  s.y = view_of(y, index == 1);
  if (p.gate && index == p.scans - 1) s.gate = view_of(*p.gate, index == 1);
  s.state = scan_rows(state, index);
  return s;
}

// The tensors of the backward pass, and its scans.
struct Gradients {
  Tensor gy, gw, gu, gk, gv;
  std::optional<Tensor> ggate;
  Tensor state, gstate, partial;

  Gradients(const Problem& p, const Tensor& gy_, const Tensor& state_)
      : gy(gy_),
        gw(torch::stable::new_zeros(p.w, p.w.sizes())),
        gu(torch::stable::new_zeros(p.u, p.u.sizes())),
        gk(output_like(p.k, p.scans > 1)),
        gv(output_like(p.v, p.scans > 1)),
        state(state_),
        gstate(p.new_state()),
        partial(p.new_partial()) {
    if (p.gate) ggate = output_like(*p.gate, p.scans > 1);
  }

  wkv::Scan scan(const Problem& p, int64_t index) const {
    wkv::Scan s = p.scan(index);
    s.gy = view_of(gy, index == 1);
    s.gk = view_of(gk, index == 1);
    s.gv = view_of(gv, index == 1);
    if (p.gate) s.gate = view_of(*p.gate, index == 1), s.ggate = view_of(*ggate, index == 1);
    s.state = scan_rows(state, index);
    s.gstate = scan_rows(gstate, index);
    s.partial = scan_rows(partial, index);
    return s;
  }

  GradientResults result(const Problem& p, const Tensor& w, const Tensor& u) const {
    return {torch::stable::to(gw, w.scalar_type()), torch::stable::to(gu, u.scalar_type()), rounded_like(p.k, gk),
            rounded_like(p.v, gv), p.gate ? std::optional<Tensor>(rounded_like(*p.gate, *ggate)) : std::nullopt};
  }
};

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

using CudaScans = std::array<wkv::Scan, 2>;

Tensor new_flags(const Problem& p, const CudaScans& scans) {
  const int64_t count = wkv::cuda_flag_count(scans.data(), static_cast<int>(p.scans));
  return torch::stable::new_empty(p.k, {&count, 1}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> wkv_cuda(Tensor w, Tensor u, Tensor k, Tensor v, std::optional<Tensor> gate) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const Problem p(w, u, k, v, gate);
  Tensor y = output_like(k, p.scans > 1), state = p.new_state();
  if (!p.empty()) {
    CudaScans scans;
    for (int64_t i = 0; i < p.scans; ++i) scans[i] = forward_scan(p, i, y, state);
    Tensor flags = new_flags(p, scans);
    check_cuda(wkv::cuda_forward(scans.data(), static_cast<int>(p.scans), static_cast<unsigned char*>(flags.data_ptr()),
                                 current_stream(k.get_device_index())));
  }
  return {rounded_like(k, y), state};
}

GradientResults wkv_backward_cuda(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, std::optional<Tensor> gate,
                                  Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const Problem p(w, u, k, v, gate);
  p.check_like_k(gy);
  const Gradients gradients(p, gy, state);
  if (!p.empty()) {
    CudaScans scans;
    for (int64_t i = 0; i < p.scans; ++i) scans[i] = gradients.scan(p, i);
    Tensor flags = new_flags(p, scans);
    check_cuda(wkv::cuda_backward(scans.data(), static_cast<int>(p.scans),
                                  static_cast<unsigned char*>(flags.data_ptr()), scan_rows(gradients.gw, 0),
                                  scan_rows(gradients.gu, 0), current_stream(k.get_device_index())));
  }
  return gradients.result(p, w, u);
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
  m.def("wkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? gate=None) -> (Tensor y, Tensor state)");
  m.def(
      "wkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? gate, Tensor state)"
      " -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor? ggate)");
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
