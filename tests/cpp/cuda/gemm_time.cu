// Speed of the base products in CUDA graphs of dependent launches, weights rotating past L2.

#include <cuda_fp16.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>

#include "backend/cuda/kernels/device/launch.h"
#include "backend/cuda/kernels/device/pdl.cuh"
#include "cuda/gemm_check.h"

namespace deltazip::cuda::check {
namespace {

constexpr std::size_t kRotatingBytes = std::size_t{600} << 20;
constexpr int kMinLaunches = 16;

__global__ void __launch_bounds__(512)
    read_kernel(const uint4* data, std::size_t count, std::uint32_t* out) {
  std::uint32_t all = 0;
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i + 7 * stride < count;
       i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] = __ldcs(data + i + static_cast<std::size_t>(j) * stride);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) all ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (all == 0x12345678) out[0] = all;
}

struct Bench {
  const Scratch& scratch;
  CublasLt& lt;
  cudaStream_t stream;
  const Memory& weights;  // all of them, one after another
  const Memory& x;
  const Memory& y;
  mutable std::size_t num_streamed = 0;

  void stream_once(std::size_t offset, Shape shape, std::int64_t tokens,
                   DType y_dtype = DType::kFloat16) const {
    launch_stream_gemm(stream_params(scratch, x.get(), weights.get(offset), y.get(), tokens, shape,
                                     DType::kFloat16, y_dtype, form_of(num_streamed++)),
                       stream);
  }
  void lt_once(std::size_t offset, Shape shape, std::int64_t tokens, LtChoice choice,
               DType y_dtype = DType::kFloat16) const {
    DZ_INTERNAL(lt.run({x.get(), weights.get(offset), y.get(), tokens, shape.in, shape.out,
                        shape.out, DType::kFloat16, y_dtype},
                       choice, stream),
                "cuBLASLt has no algorithm");
  }
  // Microseconds of one launch, in a graph of several on different weights.
  template <typename F>
  double rotating_us(Shape shape, F&& once) const {
    const std::size_t bytes = 2 * static_cast<std::size_t>(shape.in * shape.out);
    const std::size_t count = std::max<std::size_t>(2, kRotatingBytes / bytes);
    const std::size_t launches = std::max<std::size_t>(kMinLaunches, count);
    const double us = graph_us(
        [&] {
          for (std::size_t i = 0; i < launches; ++i) once(i % count * bytes);
        },
        stream);
    return us / static_cast<double>(launches);
  }
};

void time_shapes(const Bench& bench, double peak_tbs) {
  constexpr Shape kShapes[] = {
      {4096, 4096}, {4096, 12288}, {4096, 22016}, {11008, 4096}, {4096, 32000}};
  std::printf("\nus and TB/s of weights (share of %.2f), fp16, in graphs\n", peak_tbs);
  std::printf("%-12s %4s %22s %22s\n", "K x N", "M", "cuBLASLt", "stream_gemm");
  for (const Shape shape : kShapes) {
    const double bytes = 2.0 * static_cast<double>(shape.in * shape.out);
    for (const std::int64_t tokens : {1, 16, 32, 48, 64}) {
      bench.lt_once(0, shape, tokens, LtChoice::kMeasure);
      const double lt = bench.rotating_us(shape, [&](std::size_t offset) {
        bench.lt_once(offset, shape, tokens, LtChoice::kFirst);
      });
      const double us = bench.rotating_us(
          shape, [&](std::size_t offset) { bench.stream_once(offset, shape, tokens); });
      std::printf("%5lldx%-6lld %4lld", static_cast<long long>(shape.in),
                  static_cast<long long>(shape.out), static_cast<long long>(tokens));
      for (const double t : {lt, us}) {
        std::printf(" %8.2f %5.2f (%3.0f %%)", t, bytes / t / 1e6,
                    100 * bytes / t / 1e6 / peak_tbs);
      }
      std::printf("\n");
    }
  }
}

// Stands for the row-wise kernels of a step: reads the product before, writes the next one's x.
__global__ void row_kernel(const __half* y, __half* x, std::int64_t y_stride, std::int64_t x_stride,
                           int count) {
  griddep_launch();
  griddep_wait();
  const std::int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    x[row * x_stride + i] = __float2half(0.25F * __half2float(y[row * y_stride + i]));
  }
}

// All products of a decode step of the Llama-2-7B shape, each on weights of its own and dependent
// on the one before, with a row-wise kernel between: the floor of a step by each way.
void time_step(const Bench& bench, double peak_tbs, bool with_rows) {
  constexpr Shape kLayer[] = {{4096, 12288}, {4096, 4096}, {4096, 22016}, {11008, 4096}};
  constexpr Shape kHead{4096, 32000};
  constexpr int kLayers = 32;
  std::size_t total = 2 * static_cast<std::size_t>(kHead.in * kHead.out);
  for (const Shape s : kLayer) total += 2 * kLayers * static_cast<std::size_t>(s.in * s.out);
  std::printf("\nall products of a Llama-2-7B step%s, %.2f GB, ms (TB/s)\n",
              with_rows ? ", row-wise kernels between" : "", static_cast<double>(total) / 1e9);
  if (total > bench.weights.num_bytes()) return;
  for (const std::int64_t tokens : {1, 8, 16, 32, 48, 64, 128}) {
    const auto step_us = [&](const auto& once) {
      const auto body = [&] {
        std::size_t offset = 0;
        const auto next = [&](Shape shape, std::int64_t next_in, DType y_dtype) {
          once(offset, shape, y_dtype);
          offset += 2 * static_cast<std::size_t>(shape.in * shape.out);
          if (!with_rows || next_in == 0) return;
          launch(row_kernel, {static_cast<unsigned>(tokens), 512}, bench.stream,
                 bench.y.get<const __half>(), bench.x.get<__half>(), shape.out, next_in,
                 static_cast<int>(std::min(shape.out, next_in)));
        };
        for (int layer = 0; layer < kLayers; ++layer) {
          for (const Shape shape : kLayer) {
            next(shape, shape.out == 22016 ? 11008 : 4096, DType::kFloat16);
          }
        }
        next(kHead, 0, DType::kFloat32);
      };
      return graph_us(body, bench.stream);
    };
    for (const Shape shape : kLayer) bench.lt_once(0, shape, tokens, LtChoice::kMeasure);
    bench.lt_once(0, kHead, tokens, LtChoice::kMeasure, DType::kFloat32);
    const double lt = step_us([&](std::size_t offset, Shape shape, DType y_dtype) {
      bench.lt_once(offset, shape, tokens, LtChoice::kFirst, y_dtype);
    });
    std::printf("M %4lld cuBLASLt %6.3f (%.2f)", static_cast<long long>(tokens), lt / 1e3,
                static_cast<double>(total) / lt / 1e6);
    if (tokens <= base_gemm::kMaxTokens) {
      const double us = step_us([&](std::size_t offset, Shape shape, DType y_dtype) {
        bench.stream_once(offset, shape, tokens, y_dtype);
      });
      std::printf(" | stream_gemm %6.3f (%.2f, %.0f %%)", us / 1e3,
                  static_cast<double>(total) / us / 1e6,
                  100 * static_cast<double>(total) / us / 1e6 / peak_tbs);
    }
    std::printf("\n");
  }
}

// Rows of a prompt: the library's first choice, what measuring chose, and what that cost. A
// bucket's own rows come first, then fewer that take its algorithm over.
void time_prefill(const Bench& bench) {
  std::printf(
      "\ncuBLASLt at many rows: us, TFLOP/s of the first choice, of the measured; ms to "
      "measure\n");
  for (const Shape shape : {Shape{4096, 4096}, {4096, 12288}, {4096, 22016}, {11008, 4096}}) {
    const double tera = 2e-6 * static_cast<double>(shape.in * shape.out);
    for (const std::int64_t tokens : {256, 192, 512, 1024, 2048, 1536, 4096, 3072}) {
      const auto time = [&] {
        const auto body = [&] {
          for (std::size_t i = 0; i < 4; ++i) {
            bench.lt_once(i * 2 * static_cast<std::size_t>(shape.in * shape.out), shape, tokens,
                          LtChoice::kFirst);
          }
        };
        return graph_us(body, bench.stream, 3) / 4;
      };
      const double first = time();
      const auto begin = std::chrono::steady_clock::now();
      bench.lt_once(0, shape, tokens, LtChoice::kMeasure);
      DZ_CUDA(cudaStreamSynchronize(bench.stream));
      const std::chrono::duration<double, std::milli> spent =
          std::chrono::steady_clock::now() - begin;
      const double measured = time();
      std::printf("%5lldx%-6lld M %5lld %9.1f %5.0f %9.1f %5.0f %8.1f\n",
                  static_cast<long long>(shape.in), static_cast<long long>(shape.out),
                  static_cast<long long>(tokens), first, tera * static_cast<double>(tokens) / first,
                  measured, tera * static_cast<double>(tokens) / measured, spent.count());
    }
  }
}

}  // namespace

double graph_us(const std::function<void()>& body, cudaStream_t stream, int repetitions) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  DZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  DZ_CUDA(cudaStreamEndCapture(stream, &graph));
  DZ_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin = nullptr, end = nullptr;
  DZ_CUDA(cudaEventCreate(&begin));
  DZ_CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < repetitions + 2; ++i) {
    DZ_CUDA(cudaEventRecord(begin, stream));
    DZ_CUDA(cudaGraphLaunch(executable, stream));
    DZ_CUDA(cudaEventRecord(end, stream));
    DZ_CUDA(cudaEventSynchronize(end));
    float ms = 0.0F;
    DZ_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  DZ_CUDA(cudaEventDestroy(begin));
  DZ_CUDA(cudaEventDestroy(end));
  DZ_CUDA(cudaGraphExecDestroy(executable));
  DZ_CUDA(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return 1e3 * static_cast<double>(times[times.size() / 2]);
}

void time_products(const Scratch& scratch, CublasLt& lt, cudaStream_t stream) {
  const Memory weights(std::size_t{13500} << 20);
  const Memory x(2 * std::size_t{4096} * 11008), y(4 * std::size_t{4096} * 32000);
  fill(weights.get(), weights.num_bytes() / 2, DType::kFloat16, 0.02F, 3, stream);
  fill(x.get(), x.num_bytes() / 2, DType::kFloat16, 1.0F, 4, stream);
  DZ_CUDA(cudaStreamSynchronize(stream));
  double peak = 0;
  for (const int per_sm : {1, 2, 3, 4}) {
    const std::size_t bytes = std::size_t{4} << 30;
    const double us = graph_us(
        [&] {
          read_kernel<<<static_cast<unsigned>(scratch.num_sms * per_sm), 512, 0, stream>>>(
              weights.get<const uint4>(), bytes / 16, y.get<std::uint32_t>());
        },
        stream);
    peak = std::max(peak, static_cast<double>(bytes) / us / 1e6);
  }
  std::printf("read stream, 4 GiB: %.3f TB/s\n", peak);
  const Bench bench{scratch, lt, stream, weights, x, y};
  time_prefill(bench);
  time_shapes(bench, peak);
  time_step(bench, peak, false);
  time_step(bench, peak, true);
}

}  // namespace deltazip::cuda::check
