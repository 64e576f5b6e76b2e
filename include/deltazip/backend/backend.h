#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "deltazip/backend/ops.h"
#include "deltazip/base/tensor_view.h"

namespace deltazip {

// An ordered queue of work on one device.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual void synchronize() = 0;  // returns when all work given so far is done
};

// A point in a stream that can be asked for or waited for.
class Event {
 public:
  virtual ~Event() = default;
  // Milliseconds of device time from `before` to this one; both recorded and done.
  virtual double ms_since(const Event& before) const = 0;
  virtual void record(Stream& stream) = 0;
  virtual bool is_done() const = 0;
  virtual void wait(Stream& stream) = 0;  // later work of `stream` waits for the recorded point
  // Returns when the recorded point has passed. As Stream::synchronize(), but what was given to the
  // stream since then may still run.
  virtual void synchronize() = 0;
};

// Device memory. Freed on destruction; movable, not copyable.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, std::size_t num_bytes, std::shared_ptr<void> owner)
      : owner_(std::move(owner)), data_(data), num_bytes_(num_bytes) {}
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::size_t num_bytes() const { return num_bytes_; }

 private:
  std::shared_ptr<void> owner_;
  void* data_ = nullptr;
  std::size_t num_bytes_ = 0;
};

struct MemoryInfo {
  std::size_t total_bytes = 0;
  std::size_t free_bytes = 0;
};

struct BackendOptions {
  int num_threads = 0;  // CPU: 0 is one per available core. Ignored by devices.
  std::string isa;      // CPU: "", or force "scalar", "avx2", "avx512" (tests, measurements)
  DType compute_dtype = DType::kBFloat16;  // devices: of activations and base weights, bfloat16 or
                                           // float16. The CPU computes in float32
};

// What decides the launches of a step. Two steps with equal keys call the same ops in the same
// order, with equal shapes, counts and device pointers; the contents of host arrays may differ.
using StepKey = std::array<std::int32_t, 4>;

// What a model asks of its device, whatever its requests are.
struct ModelShape {
  KvLayer cache;                  // without data
  DType dtype = DType::kFloat32;  // of activations
  std::int64_t vocab_size = 0;
};

// One device: memory, streams, events, the packing of weights, and its Ops.
// One per engine; used by the engine's thread, except that any thread may call pack_*, tile_delta,
// allocate*, and copies and events on a stream of its own. Memory is 64-byte aligned.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string description() const = 0;  // "cpu: AVX-512, 2 threads"
  virtual Ops& ops() = 0;
  virtual MemoryInfo memory_info() const = 0;
  virtual bool shares_host_memory() const = 0;  // device pointers may be read by the host
  virtual DType activation_dtype(DType weight_dtype) const = 0;  // CPU: always float32
  // What pack_weight makes of a checkpoint's dtype. CPU: the same.
  virtual DType packed_dtype(DType dtype) const { return dtype; }

  // Throws InvalidArgument if a step of such a model might be refused: better at start.
  virtual void check_model(const ModelShape& /*shape*/) const {}

  virtual Buffer allocate(std::size_t num_bytes) = 0;       // throws ResourceExhausted
  virtual Buffer allocate_host(std::size_t num_bytes) = 0;  // pinned where that exists
  virtual std::unique_ptr<Stream> create_stream() = 0;
  virtual std::unique_ptr<Event> create_event() = 0;
  virtual void copy_to_device(void* device, const void* host, std::size_t num_bytes,
                              Stream& stream) = 0;
  virtual void copy_to_host(void* host, const void* device, std::size_t num_bytes,
                            Stream& stream) = 0;
  virtual void copy_on_device(void* to, const void* from, std::size_t num_bytes,
                              Stream& stream) = 0;

  // Calls `body`, which gives one step's ops to `stream`. A device may record what `body` launches
  // and, when the key comes again, replay that: then ops only refresh the contents of host arrays.
  virtual void run_step(const StepKey& /*key*/, Stream& /*stream*/,
                        const std::function<void()>& body) {
    body();
  }
  // As run_step, for a step whose shape need not come again. A device may call `body` twice, first
  // to take over the host arrays that its ops bring, all in one copy: both times it must give the
  // same ops the same arrays.
  virtual void run_once(Stream& /*stream*/, const std::function<void()>& body) { body(); }
  // How many rows to pad a decode step of `num_rows` to, so that few keys serve all batches.
  // 0: there is nothing to gain, do not pad and do not use run_step.
  virtual std::int32_t padded_rows(std::int32_t /*num_rows*/) const { return 0; }

  // Base weights. packed_bytes is what pack_weight writes to `device`; `host` is [rows, columns].
  virtual std::size_t packed_bytes(DType dtype, std::int64_t rows, std::int64_t columns) const = 0;
  virtual void pack_weight(void* device, ConstTensorView host, Stream& stream) = 0;

  // Deltas: the one re-tiling between file and kernel, host to host. Where no kernel reads `type`,
  // a matrix becomes one of another type that holds the same values: that is DeltaMatrix's.
  virtual DeltaType tiled_type(DeltaType type) const { return type; }
  virtual std::size_t tiled_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                                  std::int32_t group_size) const = 0;
  virtual void tile_delta(void* host, const DeltaSource& source) const = 0;
};

// "cpu", or "cuda" / "cuda:N" (its library is opened on demand).
// Throws InvalidArgument: an unknown name, no such device, or no CUDA library, with what was found.
std::unique_ptr<Backend> make_backend(std::string_view device, const BackendOptions& options = {});

}  // namespace deltazip
