// Times paged attention: decode by the share of a read stream, prefill by TFLOP/s.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/kernels/paged_attention/paged_attention.h"
#include "cuda/attention_common.h"

namespace deltazip::cuda {
namespace {

// Small pseudo-random float16 or zero-mean noise; zeros would flatter power and clocks.
__global__ void fill_noise(std::uint16_t* to, std::size_t count) {
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761u;
    x = (x ^ (x >> 15)) * 2246822519u;
    x ^= x >> 13;
    // sign and ten bits of mantissa, exponent of 0.25 to 2
    to[i] = static_cast<std::uint16_t>((x & 0x83FFu) | ((13u + (x >> 16) % 3u) << 10));
  }
}

__global__ void __launch_bounds__(1024)
    read_stream(const uint4* from, std::size_t count, std::uint32_t* to) {
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  std::uint32_t sum = 0;
  std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = from[i + j * stride];
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678u) *to = sum;
}

// Median milliseconds of what `record` puts into a stream, as a graph.
double time_graph(const std::function<void(cudaStream_t)>& record) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t from = nullptr, to = nullptr;
  DZ_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  DZ_CUDA(cudaEventCreate(&from));
  DZ_CUDA(cudaEventCreate(&to));
  DZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  record(stream);
  DZ_CUDA(cudaStreamEndCapture(stream, &graph));
  DZ_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<float> times;
  for (int repeat = 0; repeat < 9; ++repeat) {
    DZ_CUDA(cudaEventRecord(from, stream));
    DZ_CUDA(cudaGraphLaunch(exec, stream));
    DZ_CUDA(cudaEventRecord(to, stream));
    DZ_CUDA(cudaStreamSynchronize(stream));
    float ms = 0;
    DZ_CUDA(cudaEventElapsedTime(&ms, from, to));
    if (repeat >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  cudaStreamDestroy(stream);
  return static_cast<double>(times[times.size() / 2]);
}

double read_stream_rate(const DeviceArray<std::uint16_t>& pool) {
  DeviceArray<std::uint32_t> sink(1);
  const std::size_t count = std::min(pool.size() * 2, std::size_t{4} << 30) / 16;
  const double ms = time_graph([&](cudaStream_t stream) {
    read_stream<<<static_cast<unsigned>(2 * device_sms()), 1024, 0, stream>>>(
        reinterpret_cast<const uint4*>(pool.data()), count, sink.data());
  });
  return static_cast<double>(count) * 16 / ms / 1e6;
}

// Launches go round "layers", different places in the pool, so that no launch finds its keys in L2.
void time_case(const char* title, const DeviceArray<std::uint16_t>& pool, const Heads& heads,
               const std::vector<Length>& lengths, double read_rate) {
  std::vector<AttentionSequence> sequences;
  std::vector<std::vector<std::int32_t>> tables(lengths.size());
  std::int32_t num_blocks = 0, first_row = 0;
  double num_keys = 0, num_pairs = 0;
  for (const Length& length : lengths) {
    num_blocks += (length.context_length + heads.block_size - 1) / heads.block_size;
    num_keys += length.context_length;
    for (std::int32_t i = 0; i < length.num_rows; ++i) {
      num_pairs += length.context_length - length.num_rows + i + 1;
    }
  }
  std::vector<std::int32_t> order(to_size(num_blocks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), Rng(7));
  std::size_t next = 0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    tables[s].resize(
        to_size((lengths[s].context_length + heads.block_size - 1) / heads.block_size));
    for (auto& block : tables[s]) block = order[next++];
    sequences.push_back(
        {first_row, lengths[s].num_rows, lengths[s].context_length, tables[s].data()});
    first_row += lengths[s].num_rows;
  }
  const AttentionShape shape{heads.num_heads, heads.num_kv_heads,
                             heads.head_dim,  heads.block_size,
                             first_row,       static_cast<std::int32_t>(lengths.size())};
  AttentionPlan plan;
  plan.build(sequences, shape);
  const DeviceArray<std::int32_t> words(
      std::vector<std::int32_t>(plan.words().begin(), plan.words().end()));
  const std::size_t half_layer =
      to_size(std::int64_t{num_blocks} * heads.num_kv_heads * heads.block_size * heads.head_dim);
  const std::size_t num_layers = std::clamp<std::size_t>(pool.size() / (2 * half_layer), 1, 64);
  DeviceArray<std::uint16_t> qkv(
      to_size(std::int64_t{first_row} * (heads.num_heads + 2 * heads.num_kv_heads)) *
      to_size(heads.head_dim));
  fill_noise<<<1024, 256>>>(qkv.data(), qkv.size());
  DeviceArray<std::uint16_t> out(to_size(std::int64_t{first_row} * heads.num_heads) *
                                 to_size(heads.head_dim));
  const Scratch scratch(static_cast<std::int64_t>(lengths.size()), heads);
  prepare_paged_attention(DType::kFloat16, heads.head_dim);
  const std::size_t num_launches = std::max<std::size_t>(num_layers, 4);
  DZ_CUDA(cudaDeviceSynchronize());
  const double us =
      1e3 / static_cast<double>(num_launches) * time_graph([&](cudaStream_t stream) {
        for (std::size_t i = 0; i < num_launches; ++i) {
          const std::uint16_t* keys = pool.data() + i % num_layers * 2 * half_layer;
          launch_paged_attention(
              {qkv.data(), out.data(), keys, keys + half_layer, words.data(), scratch.sums.data(),
               scratch.softmax.data(), scratch.counters.data(), heads.num_heads, heads.num_kv_heads,
               heads.block_size, 1.0F / std::sqrt(static_cast<float>(heads.head_dim))},
              {DType::kFloat16, heads.head_dim, device_sms(), may_prefill(shape)}, stream);
        }
      });
  const double bytes = num_keys * heads.num_kv_heads * heads.head_dim * 4 +
                       4.0 * first_row * heads.num_heads * heads.head_dim;
  const double rate = bytes / us / 1e3;
  std::printf("%-34s %8.1f MB %9.1f us %7.0f GB/s %4.0f %% %8.1f TFLOP/s\n", title, bytes / 1e6, us,
              rate, 100 * rate / read_rate,
              4.0 * num_pairs * heads.num_heads * heads.head_dim / us / 1e6);
}

}  // namespace

void time_attention() {
  DeviceArray<std::uint16_t> pool(std::size_t{5} << 30);  // 10 GiB
  fill_noise<<<4096, 256>>>(pool.data(), pool.size());
  DZ_CUDA(cudaDeviceSynchronize());
  const double read_rate = read_stream_rate(pool);
  std::printf("read stream %.0f GB/s\n", read_rate);
  const Heads mha{32, 32, 128, 16}, gqa{32, 8, 128, 16};
  for (const auto& [heads, kind] : {std::pair{mha, "32/32"}, std::pair{gqa, "32/8"}}) {
    for (const int context : {200, 1000, 4000}) {
      for (const int batch : {1, 8, 32, 128}) {
        const std::string title = std::string("decode ") + kind + " batch " +
                                  std::to_string(batch) + " context " + std::to_string(context);
        time_case(title.c_str(), pool, heads, std::vector<Length>(to_size(batch), {1, context}),
                  read_rate);
      }
    }
    const auto repeat = [](int count, Length length) {
      return std::vector<Length>(to_size(count), length);
    };
    const std::string prefix = std::string("prefill ") + kind;
    time_case((prefix + " 16 x 1024").c_str(), pool, heads, repeat(16, {1024, 1024}), read_rate);
    time_case((prefix + " 1 x 1024").c_str(), pool, heads, repeat(1, {1024, 1024}), read_rate);
    time_case((prefix + " 1 x 4096").c_str(), pool, heads, repeat(1, {4096, 4096}), read_rate);
    time_case((prefix + " 512 rows of 4096").c_str(), pool, heads, repeat(1, {512, 4096}),
              read_rate);
    auto mixed = repeat(64, {1, 1000});
    mixed.push_back({512, 2048});
    time_case((std::string("mixed ") + kind + " 64 decode + 512 of 2048").c_str(), pool, heads,
              mixed, read_rate);
  }
  time_case("prefill 32/32 d64 16 x 1024", pool, {32, 32, 64, 16},
            std::vector<Length>(16, {1024, 1024}), read_rate);
  time_case("prefill 16/16 d256 16 x 1024", pool, {16, 16, 256, 16},
            std::vector<Length>(16, {1024, 1024}), read_rate);
  time_case("decode 16/16 d256 batch 32 of 1000", pool, {16, 16, 256, 16},
            std::vector<Length>(32, {1, 1000}), read_rate);
}

}  // namespace deltazip::cuda
