// The base products on a GPU: against double sums on the host, then their speed.
// gemm_check [check|time|merge]: all without an argument. Exit status 1 when a check fails.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <thread>

#include "backend/cuda/kernels/device/probe.h"
#include "cuda/gemm_check.h"

namespace deltazip::cuda {

namespace check {
namespace {

__global__ void fill_kernel(std::uint16_t* data, std::size_t count, bool is_half, float rms,
                            std::uint32_t seed) {
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint32_t h = static_cast<std::uint32_t>(i ^ (i >> 32)) * 0x9E3779B1U + seed * 0x85EBCA77U;
    h = (h ^ (h >> 15)) * 0x2C1B3C6DU;
    h = (h ^ (h >> 12)) * 0x297A2D39U;
    h ^= h >> 15;
    const float value = (static_cast<float>(h >> 8) * 0x1p-23F - 1.0F) * rms * 1.7320508F;
    data[i] = is_half ? __half_as_ushort(__float2half(value))
                      : __bfloat16_as_ushort(__float2bfloat16(value));
  }
}

constexpr std::size_t kGuardBytes = 4096;
constexpr std::uint8_t kPoison = 0xFF;  // NaN in every type

float to_number(std::uint16_t bits, DType dtype) {
  return dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                  : __bfloat162float(__ushort_as_bfloat16(bits));
}

std::vector<float> numbers(const void* device, std::size_t count, DType dtype) {
  std::vector<float> out(count);
  if (dtype == DType::kFloat32) {
    DZ_CUDA(cudaMemcpy(out.data(), device, 4 * count, cudaMemcpyDeviceToHost));
    return out;
  }
  std::vector<std::uint16_t> bits(count);
  DZ_CUDA(cudaMemcpy(bits.data(), device, 2 * count, cudaMemcpyDeviceToHost));
  for (std::size_t i = 0; i < count; ++i) out[i] = to_number(bits[i], dtype);
  return out;
}

// [tokens, out], summed in double over all cores.
std::vector<double> reference(const std::vector<float>& x, const std::vector<float>& weight,
                              std::size_t tokens, Shape shape) {
  const auto in = static_cast<std::size_t>(shape.in), out = static_cast<std::size_t>(shape.out);
  std::vector<double> y(tokens * out);
  const unsigned num_threads = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t n = t; n < out; n += num_threads) {
        for (std::size_t m = 0; m < tokens; ++m) {
          double sums[4] = {};
          for (std::size_t k = 0; k < in; ++k) {
            sums[k & 3] += static_cast<double>(x[m * in + k]) * weight[n * in + k];
          }
          y[m * out + n] = sums[0] + sums[1] + sums[2] + sums[3];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return y;
}

// y between poisoned guards.
struct Output {
  Output(std::size_t count_in, DType dtype_in)
      : count(count_in),
        dtype(dtype_in),
        num_bytes(count * size_of(dtype)),
        memory(num_bytes + 2 * kGuardBytes) {}
  void poison() const { memory.set(kPoison); }
  void* data() const { return memory.get(kGuardBytes); }
  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> out(memory.num_bytes());
    DZ_CUDA(cudaMemcpy(out.data(), memory.get(), out.size(), cudaMemcpyDeviceToHost));
    return out;
  }
  bool guards_intact() const {
    const std::vector<std::uint8_t> all = bytes();
    const auto is_poison = [](std::uint8_t byte) { return byte == kPoison; };
    const auto begin = all.begin(), end = all.end();
    const auto guard = static_cast<std::ptrdiff_t>(kGuardBytes);
    return std::all_of(begin, begin + guard, is_poison) && std::all_of(end - guard, end, is_poison);
  }
  std::size_t count;
  DType dtype;
  std::size_t num_bytes;
  Memory memory;
};

struct Tally {
  int cases = 0, failures = 0;
  double worst[3] = {};  // largest relative error by y's dtype
  void fail(const char* what, const char* kernel, Shape shape, std::int64_t tokens, DType dtype,
            DType y_dtype, double a = 0, double b = 0) {
    if (++failures > 40) return;
    std::printf("FAIL %s: %s K=%lld N=%lld M=%lld %s -> %s (%g, %g)\n", what, kernel,
                static_cast<long long>(shape.in), static_cast<long long>(shape.out),
                static_cast<long long>(tokens), name(dtype).data(), name(y_dtype).data(), a, b);
  }
};

// A result is right to its rounding: both over all elements and in the worst one.
void compare(Tally& tally, const char* kernel, const Output& y, const std::vector<double>& expected,
             Shape shape, std::int64_t tokens, DType dtype) {
  ++tally.cases;
  const std::vector<float> got = numbers(y.data(), y.count, y.dtype);
  double error = 0, size = 0, worst = 0;
  for (std::size_t i = 0; i < y.count; ++i) {
    const double difference = got[i] - expected[i];
    error += difference * difference;
    size += expected[i] * expected[i];
    worst = std::isnan(difference) ? INFINITY : std::max(worst, std::abs(difference));
  }
  const double relative = std::sqrt(error / size);
  const double rms = std::sqrt(size / static_cast<double>(y.count));
  const double unit = y.dtype == DType::kFloat32   ? 0x1p-17
                      : y.dtype == DType::kFloat16 ? 0x1p-11
                                                   : 0x1p-8;
  tally.worst[static_cast<int>(y.dtype)] =
      std::max(tally.worst[static_cast<int>(y.dtype)], relative);
  // The worst element of a uniform product is below 8 root mean squares.
  if (!(relative < unit) || !(worst < 8 * unit * rms)) {
    tally.fail("result", kernel, shape, tokens, dtype, y.dtype, relative, worst / rms);
  }
  if (!y.guards_intact()) tally.fail("guard", kernel, shape, tokens, dtype, y.dtype);
}

constexpr std::int64_t kTokens[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128};
constexpr std::int64_t kMostTokens = 128;

void check_shape(Tally& tally, const Scratch& scratch, CublasLt& lt, Shape shape, DType dtype,
                 cudaStream_t stream) {
  const auto x_count = static_cast<std::size_t>(kMostTokens * shape.in);
  const auto weight_count = static_cast<std::size_t>(shape.in * shape.out);
  const Memory x(2 * x_count), weight(2 * weight_count + kGuardBytes);
  weight.set(kPoison);  // beyond the end: NaN
  fill(x.get(), x_count, dtype, 1.0F, 1, stream);
  fill(weight.get(), weight_count, dtype, 1.0F / std::sqrt(static_cast<float>(shape.in)), 2,
       stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  const std::vector<double> expected =
      reference(numbers(x.get(), x_count, dtype), numbers(weight.get(), weight_count, dtype),
                kMostTokens, shape);
  for (const DType y_dtype : {dtype, DType::kFloat32}) {
    std::vector<std::uint8_t> first_row;
    for (const std::int64_t tokens : kTokens) {
      // Rows beyond `tokens` are NaN: nothing may read them.
      const Memory few_x(2 * static_cast<std::size_t>((tokens + 8) * shape.in));
      few_x.set(kPoison);
      DZ_CUDA(cudaMemcpyAsync(few_x.get(), x.get(), 2 * static_cast<std::size_t>(tokens * shape.in),
                              cudaMemcpyDeviceToDevice, stream));
      const Output y(static_cast<std::size_t>(tokens * shape.out), y_dtype);
      StreamGemm params = stream_params(scratch, few_x.get(), weight.get(), y.data(), tokens, shape,
                                        dtype, y_dtype);
      if (stream_gemm_takes(params)) {
        y.poison();
        launch_stream_gemm(params, stream);
        DZ_CUDA(cudaStreamSynchronize(stream));
        compare(tally, "stream", y, expected, shape, tokens, dtype);
        const std::vector<std::uint8_t> bytes = y.bytes();
        for (int repetition = 0; repetition < 3; ++repetition) {
          params.form = repetition == 1 ? base_gemm::Form::kDeep : base_gemm::Form::kWide;
          launch_stream_gemm(params, stream);
        }
        DZ_CUDA(cudaStreamSynchronize(stream));
        if (bytes != y.bytes()) tally.fail("repeat", "stream", shape, tokens, dtype, y_dtype);
        // The first row's bits do not depend on how many rows come with it.
        const std::size_t row_bytes = static_cast<std::size_t>(shape.out) * size_of(y_dtype);
        std::vector<std::uint8_t> row(
            bytes.begin() + kGuardBytes,
            bytes.begin() + kGuardBytes + static_cast<std::ptrdiff_t>(row_bytes));
        if (first_row.empty()) first_row = row;
        if (first_row != row) tally.fail("row bits", "stream", shape, tokens, dtype, y_dtype);
      }
      y.poison();
      const LtProduct product{few_x.get(), weight.get(), y.data(), tokens, shape.in,
                              shape.out,   shape.out,    dtype,    y_dtype};
      if (lt.run(product, LtChoice::kFirst, stream)) {
        DZ_CUDA(cudaStreamSynchronize(stream));
        compare(tally, "cuBLASLt", y, expected, shape, tokens, dtype);
      } else {
        std::printf("cuBLASLt has nothing for K=%lld N=%lld M=%lld\n",
                    static_cast<long long>(shape.in), static_cast<long long>(shape.out),
                    static_cast<long long>(tokens));
      }
      if (shape.in * shape.out > 4'000'000) continue;
      y.poison();
      launch_plain_gemm({few_x.get(), weight.get(), y.data(), tokens, shape.in, shape.out,
                         shape.out, dtype, y_dtype},
                        stream);
      DZ_CUDA(cudaStreamSynchronize(stream));
      compare(tally, "plain", y, expected, shape, tokens, dtype);
    }
  }
}

// A chain in which each product is the next one's x, once with a wait after each and once as a
// graph of dependent launches: a kernel that runs ahead of its predecessor would differ.
void check_chain(Tally& tally, const Scratch& scratch, std::int64_t tokens, cudaStream_t stream) {
  constexpr int kLength = 40, kWeights = 4;
  const Shape shape{2048, 2048};
  const std::size_t x_count = static_cast<std::size_t>(tokens * shape.in);
  const std::size_t weight_bytes = 2 * static_cast<std::size_t>(shape.in * shape.out);
  const Memory weights(kWeights * weight_bytes), x(2 * x_count * (kLength + 1));
  fill(weights.get(), kWeights * weight_bytes / 2, DType::kFloat16, 1.0F / 45.2548F, 7, stream);
  const auto run = [&](bool waits) {
    for (int i = 0; i < kLength; ++i) {
      launch_stream_gemm(
          stream_params(scratch, x.get(2 * x_count * static_cast<std::size_t>(i)),
                        weights.get(weight_bytes * static_cast<std::size_t>(i % kWeights)),
                        x.get(2 * x_count * static_cast<std::size_t>(i + 1)), tokens, shape,
                        DType::kFloat16, DType::kFloat16, form_of(static_cast<std::size_t>(i))),
          stream);
      if (waits) DZ_CUDA(cudaStreamSynchronize(stream));
    }
  };
  const auto begin = [&] {
    x.set(kPoison);
    fill(x.get(), x_count, DType::kFloat16, 1.0F, 9, stream);
    DZ_CUDA(cudaStreamSynchronize(stream));
  };
  begin();
  run(true);
  const std::vector<float> expected = numbers(x.get(), x_count * (kLength + 1), DType::kFloat16);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  DZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run(false);
  DZ_CUDA(cudaStreamEndCapture(stream, &graph));
  DZ_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  for (int repetition = 0; repetition < 10; ++repetition) {
    begin();
    DZ_CUDA(cudaGraphLaunch(executable, stream));
    DZ_CUDA(cudaStreamSynchronize(stream));
    ++tally.cases;
    const std::vector<float> got = numbers(x.get(), x_count * (kLength + 1), DType::kFloat16);
    if (std::memcmp(got.data(), expected.data(), 4 * got.size()) != 0) {
      tally.fail("chain", "stream", shape, tokens, DType::kFloat16, DType::kFloat16);
    }
  }
  if (std::isnan(expected.back()))
    tally.fail("NaN chain", "stream", shape, tokens, DType::kFloat16, DType::kFloat16);
  DZ_CUDA(cudaGraphExecDestroy(executable));
  DZ_CUDA(cudaGraphDestroy(graph));
}

}  // namespace

void fill(void* data, std::size_t count, DType dtype, float rms, std::uint32_t seed,
          cudaStream_t stream) {
  fill_kernel<<<1024, 256, 0, stream>>>(static_cast<std::uint16_t*>(data), count,
                                        dtype == DType::kFloat16, rms, seed);
  DZ_CUDA(cudaGetLastError());
}

int check_products(const Scratch& scratch, CublasLt& lt, cudaStream_t stream) {
  constexpr Shape kShapes[] = {{576, 1536},  {1536, 576},  {576, 49152}, {100, 7},    {104, 7},
                               {8, 1},       {1, 1},       {33, 65},     {3584, 250}, {11008, 512},
                               {4096, 1000}, {18944, 130}, {64, 128},    {72, 4099}};
  Tally tally;
  for (const Shape shape : kShapes) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      check_shape(tally, scratch, lt, shape, dtype, stream);
    }
  }
  if (runs_hopper_code()) {
    for (const std::int64_t tokens : {1, 8, 16, 32, 64})
      check_chain(tally, scratch, tokens, stream);
  }
  std::vector<std::uint32_t> counters(scratch.counters.num_bytes() / 4);
  DZ_CUDA(cudaMemcpy(counters.data(), scratch.counters.get(), scratch.counters.num_bytes(),
                     cudaMemcpyDeviceToHost));
  if (std::any_of(counters.begin(), counters.end(), [](std::uint32_t c) { return c != 0; })) {
    ++tally.failures;
    std::printf("FAIL: counters are not zero after all\n");
  }
  std::printf(
      "base products: %d cases, %d failures; worst relative error fp32 %.1e fp16 %.1e "
      "bf16 %.1e\n",
      tally.cases, tally.failures, tally.worst[0], tally.worst[1], tally.worst[2]);
  return tally.failures;
}

}  // namespace check
}  // namespace deltazip::cuda

int main(int argc, char** argv) {
  using namespace deltazip::cuda;
  const std::string_view what = argc > 1 ? argv[1] : "all";
  try {
    cudaDeviceProp device{};
    DZ_CUDA(cudaGetDeviceProperties(&device, 0));
    cudaStream_t stream = nullptr;
    DZ_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CublasLt lt;
    std::printf("%s, %d multiprocessors, %s\n", device.name, device.multiProcessorCount,
                lt.description().c_str());
    const check::Scratch scratch(device.multiProcessorCount);
    int failures = 0;
    const bool all = what == "all";
    if (all || what == "check") failures = check::check_products(scratch, lt, stream);
    if (all || what == "time") check::time_products(scratch, lt, stream);
    if (all || what == "merge") check::time_merges(lt, scratch.num_sms, stream);
    return failures == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("gemm_check: %s\n", error.what());
    return 1;
  }
}
