#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>

#include "backend/cuda/cuda_stream.h"

namespace deltazip::cuda {

// How the ops called now reach the device.
enum class StepMode : std::uint8_t {
  kEager,   // arguments are copied and kernels launched at once
  kRecord,  // kernels are captured; arguments are copied once, before the graph first runs
  kReplay,  // kernels are not launched: the recorded ones run on refreshed arguments
  kGather,  // nothing is launched: arguments are taken, for the same ops in kEager to find
};

// The small host arrays that ops bring (tokens, pointers, tasks), on their way to the device:
// packed into pinned memory with a device twin. Equal sequences of put() give equal device
// addresses, which is what a recorded graph holds. Engine thread.
class StepArgs {
 public:
  StepArgs();
  ~StepArgs();
  StepArgs(const StepArgs&) = delete;
  StepArgs& operator=(const StepArgs&) = delete;

  // The device address of a copy of `host`, made before this returns. The same array put again
  // within a step is copied once.
  template <typename T>
  const T* put(std::span<const T> host, CudaStream& stream) {
    return static_cast<const T*>(put_bytes(host.data(), host.size_bytes(), stream));
  }
  // As put(), for an array whose size may differ between steps that replay one graph: block tables.
  // Only one a step, apart from repetitions.
  template <typename T>
  const T* put_tail(std::span<const T> host, CudaStream& stream) {
    return static_cast<const T*>(put_tail_bytes(host.data(), host.size_bytes(), stream));
  }
  // False while a recorded graph is refreshed, or arguments are gathered: what a graph or a later
  // pass will launch must not be launched now.
  bool launching() const { return mode_ == StepMode::kEager || mode_ == StepMode::kRecord; }
  // What is launched may depend on shapes and device pointers alone.
  bool is_recorded() const { return mode_ == StepMode::kRecord || mode_ == StepMode::kReplay; }
  StepMode mode() const { return mode_; }
  // Between two marks of the stream lies one step. Within it an array at one address keeps its
  // contents: what an op made of it may be kept.
  std::int64_t step() const { return step_; }
  // One call of a step's body. In the two passes of an eager step ops come in the same order.
  std::int64_t pass() const { return pass_; }

  void begin(StepMode mode);        // kRecord or kReplay
  void upload(CudaStream& stream);  // all that was put since begin(), before the graph is launched
  void end() { mode_ = StepMode::kEager; }
  std::size_t num_bytes() const;  // put since begin(), without the tail

  // Runs `body` twice, to gather what it puts and to launch: one copy instead of one an array.
  void run_gathered(CudaStream& stream, const std::function<void()>& body);

 private:
  struct Arena;

  const void* put_bytes(const void* host, std::size_t num_bytes, CudaStream& stream);
  const void* put_tail_bytes(const void* host, std::size_t num_bytes, CudaStream& stream);
  const void* place(Arena& arena, const void* host, std::size_t num_bytes, CudaStream& stream);
  void upload_eager(CudaStream& stream);

  void begin_eager(CudaStream& stream);  // if a mark was set since the last eager argument
  // All that was put until `mark` has passed: eager arguments may be overwritten, unless a later
  // step's lie there already.
  void forget(std::int64_t mark);

  StepMode mode_ = StepMode::kEager;
  std::int64_t step_ = 0, pass_ = 0;
  std::int64_t mark_ = 0;     // of the eager arguments
  bool will_forget_ = false;  // the stream has been asked to say when they have passed
  std::unique_ptr<Arena> eager_, graph_, tail_;
};

}  // namespace deltazip::cuda
