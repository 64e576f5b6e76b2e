#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/cuda_ops.h"
#include "backend/cuda/kernels/device/probe.h"
#include "backend/cuda/kernels/sbmm/tiling.h"
#include "backend/cuda/step_graph.h"
#include "backend/ternary_from_sign.h"
#include "deltazip/backend/backend.h"

namespace deltazip::cuda {
namespace {

// A decode step of more rows gains nothing from a graph.
constexpr std::int32_t kMaxGraphRows = 512;

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(int device) : device_(device) {
    use_device(device_);
    DZ_CUDA(cudaEventCreate(&event_));
  }
  ~CudaEvent() override { cudaEventDestroy(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  void record(Stream& stream) override {
    stream_ = &to_cuda(stream);
    DZ_CUDA(cudaEventRecord(event_, stream_->get()));
    mark_ = stream_->set_mark();
  }
  void synchronize() override {
    use_device(device_);
    DZ_CUDA(cudaEventSynchronize(event_));
    if (stream_ != nullptr) stream_->passed(mark_);
  }
  bool is_done() const override {
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) return false;
    check_cuda(error, "cudaEventQuery");
    return true;
  }
  void wait(Stream& stream) override {
    DZ_CUDA(cudaStreamWaitEvent(to_cuda(stream).get(), event_));
  }
  double ms_since(const Event& before) const override {
    float ms = 0.0F;
    DZ_CUDA(cudaEventElapsedTime(&ms, dynamic_cast<const CudaEvent&>(before).event_, event_));
    return static_cast<double>(ms);
  }

 private:
  int device_;
  cudaEvent_t event_ = nullptr;
  CudaStream* stream_ = nullptr;  // that it was recorded in, which outlives it
  std::int64_t mark_ = 0;
};

// What this machine has, checked before anything is made: every refusal says what was found.
DeviceInfo inspect(int device, const BackendOptions& options) {
  int driver = 0, runtime = 0, count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  DZ_CHECK(driver != 0, "device 'cuda': no NVIDIA driver is loaded on this machine (",
           cudaGetErrorString(error), ")");
  DZ_CHECK(error != cudaErrorInsufficientDriver, "device 'cuda': the NVIDIA driver supports CUDA ",
           version(driver), ", this build needs ", version(runtime), " or newer");
  DZ_CHECK(error == cudaSuccess && count > 0, "device 'cuda': no GPU is visible (",
           cudaGetErrorString(error), "; CUDA_VISIBLE_DEVICES may hide it)");
  DZ_CHECK(device < count, "device 'cuda:", device, "': this machine has ", count,
           " GPUs, cuda:0 to cuda:", count - 1);
  cudaDeviceProp properties{};
  DZ_CUDA(cudaGetDeviceProperties(&properties, device));
  use_device(device);
  DZ_CHECK(code_architecture() > 0, "device 'cuda:", device, "': this build has no kernels for ",
           properties.name, ", compute capability ", properties.major, ".", properties.minor,
           ": they need 8.0 or newer, and DELTAZIP_CUDA_ARCHITECTURES that include it when built");
  DZ_CHECK(options.compute_dtype == DType::kFloat16 || options.compute_dtype == DType::kBFloat16,
           "device 'cuda' computes in float16 or bfloat16, got ", name(options.compute_dtype));
  return {device, properties.multiProcessorCount, properties.sharedMemPerBlockOptin,
          options.compute_dtype};
}

// Device memory that comes and goes (delta slots) without stopping the device, as cudaFree would.
class MemoryPool {
 public:
  explicit MemoryPool(int device) : device_(device) {
    use_device(device);
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device};
    DZ_CUDA(cudaMemPoolCreate(&pool_, &properties));
    std::uint64_t keep_all = UINT64_MAX;
    DZ_CUDA(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep_all));
    DZ_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~MemoryPool() {
    use_device(device_);
    cudaStreamDestroy(stream_);
    cudaMemPoolDestroy(pool_);
  }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  void* allocate(std::size_t num_bytes) {
    use_device(device_);
    void* data = nullptr;
    DZ_CUDA(cudaMallocFromPoolAsync(&data, num_bytes, pool_, stream_));
    DZ_CUDA(cudaStreamSynchronize(stream_));
    return data;
  }
  void free(void* data) {
    use_device(device_);
    cudaFreeAsync(data, stream_);
  }
  // Bytes held by the pool that nobody uses.
  std::size_t idle_bytes() const {
    std::uint64_t reserved = 0, used = 0;
    DZ_CUDA(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &reserved));
    DZ_CUDA(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrUsedMemCurrent, &used));
    return static_cast<std::size_t>(reserved - used);
  }

 private:
  int device_;
  cudaMemPool_t pool_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

// Pinned memory. Pinning is slow and unpinning waits for the device, so the last buffers given back
// are kept: a variant read in has mostly the size of the one that made room for it. Any thread.
class PinnedPool {
 public:
  explicit PinnedPool(int device) : device_(device) { idle_.reserve(kMaxIdle); }
  ~PinnedPool() { clear(); }
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  struct Block {
    void* data = nullptr;
    std::size_t num_bytes = 0;
  };

  Block allocate(std::size_t num_bytes) {
    if (const Block found = take(num_bytes); found.data != nullptr) return found;
    use_device(device_);
    Block block{nullptr, num_bytes};
    const auto pin = [&] { return cudaHostAlloc(&block.data, num_bytes, cudaHostAllocPortable); };
    cudaError_t error = pin();
    if (error != cudaSuccess) {
      cudaGetLastError();  // not sticky; clear it
      clear();
      error = pin();
    }
    if (error != cudaSuccess) {
      cudaGetLastError();
      detail::fail<ResourceExhausted>("cuda: cannot pin ", num_bytes,
                                      " bytes of host memory: ", cudaGetErrorString(error));
    }
    return block;
  }
  void free(Block block) {
    const std::lock_guard lock(mutex_);
    if (idle_.size() == kMaxIdle) {
      cudaFreeHost(idle_.front().data);
      idle_.erase(idle_.begin());
    }
    idle_.push_back(block);
  }

 private:
  static constexpr std::size_t kMaxIdle = 2;  // no budget counts them

  // An idle block that wastes at most an eighth of itself; else none.
  Block take(std::size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    const auto found = std::ranges::find_if(idle_, [&](const Block& each) {
      return num_bytes <= each.num_bytes && each.num_bytes - each.num_bytes / 8 <= num_bytes;
    });
    if (found == idle_.end()) return {};
    const Block block = *found;
    idle_.erase(found);
    return block;
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    for (const Block& each : idle_) cudaFreeHost(each.data);
    idle_.clear();
  }

  int device_;
  std::mutex mutex_;
  std::vector<Block> idle_;
};

float as_float(float value) { return value; }
float as_float(Half value) { return to_float(value); }
float as_float(BFloat16 value) { return to_float(value); }

// [count] elements of `from`, as `dtype`, float16 or bfloat16.
void convert(std::uint16_t* to, DType dtype, ConstTensorView from) {
  const std::int64_t count = from.num_elements();
  const auto each = [&](const auto* values) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = as_float(values[i]);
      to[i] = dtype == DType::kFloat16 ? to_half(value).bits : to_bfloat16(value).bits;
    }
  };
  switch (from.dtype) {
    case DType::kFloat16:
      return each(static_cast<const Half*>(from.data));
    case DType::kBFloat16:
      return each(static_cast<const BFloat16*>(from.data));
    default:
      return each(static_cast<const float*>(from.data));
  }
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const DeviceInfo& info)
      : info_(info),
        pool_(std::make_shared<MemoryPool>(info.device)),
        pinned_(std::make_shared<PinnedPool>(info.device)),
        ops_(info),
        graphs_(ops_.args()) {
    cudaDeviceProp properties{};
    DZ_CUDA(cudaGetDeviceProperties(&properties, info.device));
    description_ = "cuda:" + std::to_string(info.device) + ": " + properties.name + ", " +
                   std::to_string(info.num_sms) + " multiprocessors, " +
                   std::string(name(info.compute_dtype));
  }

  std::string description() const override { return description_; }
  Ops& ops() override { return ops_; }
  MemoryInfo memory_info() const override {
    use_device(info_.device);
    MemoryInfo info;
    DZ_CUDA(cudaMemGetInfo(&info.free_bytes, &info.total_bytes));
    info.free_bytes += pool_->idle_bytes();
    return info;
  }
  bool shares_host_memory() const override { return false; }
  DType activation_dtype(DType) const override { return info_.compute_dtype; }
  DType packed_dtype(DType) const override { return info_.compute_dtype; }
  void check_model(const ModelShape& shape) const override { ops_.check_model(shape); }

  Buffer allocate(std::size_t num_bytes) override {
    const std::size_t size = std::max<std::size_t>(num_bytes, 1);
    void* data = nullptr;
    try {
      data = pool_->allocate(size);
    } catch (const ResourceExhausted&) {
      const MemoryInfo info = memory_info();
      detail::fail<ResourceExhausted>("cuda: cannot allocate ", num_bytes, " bytes; ",
                                      info.free_bytes, " of ", info.total_bytes, " are free");
    }
    return {data, num_bytes,
            std::shared_ptr<void>(data, [pool = pool_](void* memory) { pool->free(memory); })};
  }
  Buffer allocate_host(std::size_t num_bytes) override {
    const PinnedPool::Block block = pinned_->allocate(std::max<std::size_t>(num_bytes, 1));
    return {
        block.data, num_bytes,
        std::shared_ptr<void>(block.data, [pool = pinned_, block](void*) { pool->free(block); })};
  }
  std::unique_ptr<Stream> create_stream() override {
    return std::make_unique<CudaStream>(info_.device);
  }
  std::unique_ptr<Event> create_event() override {
    return std::make_unique<CudaEvent>(info_.device);
  }
  void copy_to_device(void* device, const void* host, std::size_t num_bytes,
                      Stream& stream) override {
    copy(device, host, num_bytes, cudaMemcpyHostToDevice, stream);
  }
  void copy_to_host(void* host, const void* device, std::size_t num_bytes,
                    Stream& stream) override {
    copy(host, device, num_bytes, cudaMemcpyDeviceToHost, stream);
  }
  void copy_on_device(void* to, const void* from, std::size_t num_bytes, Stream& stream) override {
    copy(to, from, num_bytes, cudaMemcpyDeviceToDevice, stream);
  }

  void run_step(const StepKey& key, Stream& stream, const std::function<void()>& body) override {
    use_device(info_.device);
    graphs_.run(key, to_cuda(stream), body);
  }
  void run_once(Stream& stream, const std::function<void()>& body) override {
    use_device(info_.device);
    ops_.args().run_gathered(to_cuda(stream), body);
  }
  // 1, 2, 4, 8, then steps of 8, 16 and 32: a bucket costs a graph, padding costs at most a
  // quarter.
  std::int32_t padded_rows(std::int32_t num_rows) const override {
    if (num_rows <= 0 || num_rows > kMaxGraphRows) return 0;
    const auto unsigned_rows = static_cast<std::uint32_t>(num_rows);
    if (num_rows <= 8) return static_cast<std::int32_t>(std::bit_ceil(unsigned_rows));
    const std::int32_t step = num_rows <= 64 ? 8 : num_rows <= 128 ? 16 : 32;
    return (num_rows + step - 1) / step * step;
  }

  std::size_t packed_bytes(DType dtype, std::int64_t rows, std::int64_t columns) const override {
    DZ_CHECK(is_floating(dtype), "cuda: a weight must be float32, float16 or bfloat16, got ",
             name(dtype));
    DZ_CHECK(rows > 0 && columns > 0, "cuda: a weight must not be empty, got [", rows, ", ",
             columns, "]");
    return static_cast<std::size_t>(rows * columns) * size_of(info_.compute_dtype);
  }
  // Row-major as it came, in the compute dtype: both the library and the kernels read it so.
  void pack_weight(void* device, ConstTensorView host, Stream& stream) override {
    DZ_CHECK(host.rank() == 2, "cuda: a weight must be a matrix, got ", host.shape.str());
    const std::size_t num_bytes = packed_bytes(host.dtype, host.size(0), host.size(1));
    if (host.dtype == info_.compute_dtype) {
      copy(device, host.data, num_bytes, cudaMemcpyHostToDevice, stream);
      return;
    }
    std::vector<std::uint16_t> converted(static_cast<std::size_t>(host.num_elements()));
    convert(converted.data(), info_.compute_dtype, host);
    copy(device, converted.data(), num_bytes, cudaMemcpyHostToDevice, stream);
    stream.synchronize();
  }
  std::size_t tiled_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                          std::int32_t group_size) const override {
    return tiled_delta_bytes(tiled_type(type), rows, columns, group_size);
  }
  // One kernel serves both: a sign's states are among ternary's.
  DeltaType tiled_type(DeltaType type) const override {
    return type == DeltaType::kSparse14Sign ? DeltaType::kSparse24Ternary : type;
  }
  void tile_delta(void* host, const DeltaSource& source) const override {
    if (source.type != DeltaType::kSparse14Sign) return cuda::tile_delta(host, source);
    const std::vector<std::byte> codes = ternary_from_sign(source);
    DeltaSource wide = source;
    wide.type = DeltaType::kSparse24Ternary;
    wide.values = codes;
    cuda::tile_delta(host, wide);
  }

 private:
  void copy(void* to, const void* from, std::size_t num_bytes, cudaMemcpyKind kind,
            Stream& stream) {
    if (num_bytes == 0) return;
    use_device(info_.device);
    DZ_CUDA(cudaMemcpyAsync(to, from, num_bytes, kind, to_cuda(stream).get()));
  }

  DeviceInfo info_;
  std::string description_;
  std::shared_ptr<MemoryPool> pool_;  // buffers may outlive the backend
  std::shared_ptr<PinnedPool> pinned_;
  CudaOps ops_;
  StepGraphs graphs_;
};

}  // namespace
}  // namespace deltazip::cuda

// Exceptions cross to the caller as they are: both sides are of one build.
extern "C" __attribute__((visibility("default"))) deltazip::Backend* deltazip_make_cuda_backend(
    int device, const deltazip::BackendOptions& options) {
  return new deltazip::cuda::CudaBackend(deltazip::cuda::inspect(device, options));
}
