// Speed of the base products in CUDA graphs of dependent launches, weights rotating past L2.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>

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

// Median microseconds of a graph of what `body` launches.
double graph_us(const std::function<void()>& body, cudaStream_t stream, int repetitions = 7) {
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

struct Bench {
  const Scratch& scratch;
  CublasLt& lt;
  cudaStream_t stream;
  const Memory& weights;  // all of them, one after another
  const Memory& x;
  const Memory& y;

  void stream_once(std::size_t offset, Shape shape, std::int64_t tokens, base_gemm::Tile tile,
                   int ctas_per_sm = 1, DType y_dtype = DType::kFloat16) const {
    StreamGemm params = stream_params(scratch, x.get(), weights.get(offset), y.get(), tokens, shape,
                                      DType::kFloat16, y_dtype);
    params.num_sms *= ctas_per_sm;
    launch_stream_gemm(params, tile, stream);
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
  struct Variant {
    const char* name;
    base_gemm::Tile tile;
    int ctas_per_sm;
  };
  constexpr Variant kVariants[] = {{"128/16", {128, 16}, 1},
                                   {"128/32", {128, 32}, 1},
                                   {"64/16", {64, 16}, 1},
                                   {"128/16 l2=128", {128, 16, false}, 1},
                                   {"128/16 next 0", {128, 16, true, 0}, 1},
                                   {"128/16 next 4", {128, 16, true, 4}, 1},
                                   {"128/16 next all", {128, 16, true, 1 << 20}, 1},
                                   {"128/16 two a SM", {128, 16}, 2}};
  constexpr Shape kShapes[] = {
      {4096, 4096}, {4096, 12288}, {4096, 22016}, {11008, 4096}, {4096, 32000}};
  std::printf("\nus and TB/s of weights (share of %.2f), fp16, in graphs\n", peak_tbs);
  std::printf("%-12s %4s %22s", "K x N", "M", "cuBLASLt");
  for (const Variant& v : kVariants) std::printf(" %18s", v.name);
  std::printf("\n");
  for (const Shape shape : kShapes) {
    const double bytes = 2.0 * static_cast<double>(shape.in * shape.out);
    for (const std::int64_t tokens : {1, 8, 16, 32, 64, 128}) {
      bench.lt_once(0, shape, tokens, LtChoice::kMeasure);
      const double lt = bench.rotating_us(shape, [&](std::size_t offset) {
        bench.lt_once(offset, shape, tokens, LtChoice::kFirst);
      });
      std::printf("%5lldx%-6lld %4lld %8.2f %5.2f (%3.0f %%)", static_cast<long long>(shape.in),
                  static_cast<long long>(shape.out), static_cast<long long>(tokens), lt,
                  bytes / lt / 1e6, 100 * bytes / lt / 1e6 / peak_tbs);
      for (const Variant& v : kVariants) {
        const double us = bench.rotating_us(shape, [&](std::size_t offset) {
          bench.stream_once(offset, shape, tokens, v.tile, v.ctas_per_sm);
        });
        std::printf(" %7.2f %4.2f %3.0f %%", us, bytes / us / 1e6,
                    100 * bytes / us / 1e6 / peak_tbs);
      }
      std::printf("\n");
    }
  }
}

// All products of a decode step of the Llama-2-7B shape, each on weights of its own: the floor of a
// step by each way.
void time_step(const Bench& bench, double peak_tbs) {
  constexpr Shape kLayer[] = {{4096, 12288}, {4096, 4096}, {4096, 22016}, {11008, 4096}};
  constexpr Shape kHead{4096, 32000};
  constexpr int kLayers = 32;
  std::size_t total = 2 * static_cast<std::size_t>(kHead.in * kHead.out);
  for (const Shape s : kLayer) total += 2 * kLayers * static_cast<std::size_t>(s.in * s.out);
  std::printf("\nall products of a Llama-2-7B step, %.2f GB, ms (TB/s)\n",
              static_cast<double>(total) / 1e9);
  if (total > bench.weights.num_bytes()) return;
  for (const std::int64_t tokens : {1, 8, 16, 32, 64, 128}) {
    const auto step = [&](const auto& once) {
      std::size_t offset = 0;
      const auto next = [&](Shape shape, DType y_dtype) {
        once(offset, shape, y_dtype);
        offset += 2 * static_cast<std::size_t>(shape.in * shape.out);
      };
      for (int layer = 0; layer < kLayers; ++layer) {
        for (const Shape shape : kLayer) next(shape, DType::kFloat16);
      }
      next(kHead, DType::kFloat32);
    };
    for (const Shape shape : kLayer) bench.lt_once(0, shape, tokens, LtChoice::kMeasure);
    bench.lt_once(0, kHead, tokens, LtChoice::kMeasure, DType::kFloat32);
    const double lt = graph_us(
        [&] {
          step([&](std::size_t offset, Shape shape, DType y_dtype) {
            bench.lt_once(offset, shape, tokens, LtChoice::kFirst, y_dtype);
          });
        },
        bench.stream);
    std::printf("M %4lld cuBLASLt %6.3f (%.2f)", static_cast<long long>(tokens), lt / 1e3,
                static_cast<double>(total) / lt / 1e6);
    for (const base_gemm::Tile tile : {base_gemm::Tile{128, 16}, {128, 32}, {64, 16}}) {
      const double us = graph_us(
          [&] {
            step([&](std::size_t offset, Shape shape, DType y_dtype) {
              bench.stream_once(offset, shape, tokens, tile, 1, y_dtype);
            });
          },
          bench.stream);
      std::printf("  stream %d/%d %6.3f (%.2f, %3.0f %%)", tile.rows, tile.warp_rows, us / 1e3,
                  static_cast<double>(total) / us / 1e6,
                  100 * static_cast<double>(total) / us / 1e6 / peak_tbs);
    }
    std::printf("\n");
  }
}

void time_prefill(const Bench& bench) {
  std::printf("\ncuBLASLt at many rows: us, TFLOP/s\n");
  for (const Shape shape : {Shape{4096, 4096}, {4096, 12288}, {4096, 22016}, {11008, 4096}}) {
    for (const std::int64_t tokens : {256, 1024, 4096, 16384}) {
      bench.lt_once(0, shape, tokens, LtChoice::kMeasure);
      const double us =
          graph_us(
              [&] {
                for (std::size_t i = 0; i < 4; ++i) {
                  bench.lt_once(i * 2 * static_cast<std::size_t>(shape.in * shape.out), shape,
                                tokens, LtChoice::kFirst);
                }
              },
              bench.stream, 3) /
          4;
      std::printf("%5lldx%-6lld M %5lld %9.1f %6.0f\n", static_cast<long long>(shape.in),
                  static_cast<long long>(shape.out), static_cast<long long>(tokens), us,
                  2.0 * static_cast<double>(shape.in * shape.out * tokens) / us / 1e6);
    }
  }
}

}  // namespace

void time_products(const Scratch& scratch, CublasLt& lt, cudaStream_t stream) {
  const Memory weights(std::size_t{13500} << 20);
  const Memory x(2 * std::size_t{16384} * 11008), y(4 * std::size_t{16384} * 22016);
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
  time_step(bench, peak);
}

}  // namespace deltazip::cuda::check
