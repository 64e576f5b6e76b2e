#include "backend/cuda/step_args.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "backend/cuda/cuda_check.h"

namespace deltazip::cuda {
namespace {

// 64 segments x 7 matrices x 80 layers of 64-byte tasks are 2.3 MB.
constexpr std::size_t kArenaBytes = std::size_t{16} << 20;
constexpr std::size_t kAlignment = 64;
// The host fills one while the device may still read the other.
constexpr std::size_t kNumStages = 2;

}  // namespace

struct StepArgs::Arena {
  struct Stage {
    std::byte* host = nullptr;
    cudaEvent_t uploaded = nullptr;
    bool is_pending = false;
  };
  std::array<Stage, kNumStages> stages;
  std::size_t stage = 0;
  std::byte* device = nullptr;
  std::size_t used = 0, copied = 0;
  struct Key {
    const void* host;
    std::size_t num_bytes;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Key& key) const {
      return std::hash<const void*>()(key.host) ^ key.num_bytes * 0x9E3779B97F4A7C15u;
    }
  };
  std::unordered_map<Key, std::size_t, Hash> places;  // offset of each array of this step

  Arena() {
    for (Stage& each : stages) {
      void* host = nullptr;
      DZ_CUDA(cudaHostAlloc(&host, kArenaBytes, cudaHostAllocDefault));
      each.host = static_cast<std::byte*>(host);
      DZ_CUDA(cudaEventCreateWithFlags(&each.uploaded, cudaEventDisableTiming));
    }
    void* memory = nullptr;
    DZ_CUDA(cudaMalloc(&memory, kArenaBytes));
    device = static_cast<std::byte*>(memory);
  }
  // Errors are of no use here: the context may be gone with the process.
  ~Arena() {
    for (Stage& each : stages) {
      cudaEventDestroy(each.uploaded);
      cudaFreeHost(each.host);
    }
    cudaFree(device);
  }

  std::byte* host() { return stages[stage].host; }
  // The next step's pinned memory, once the device has read what it last held.
  void turn() {
    stage = (stage + 1) % kNumStages;
    if (stages[stage].is_pending) DZ_CUDA(cudaEventSynchronize(stages[stage].uploaded));
    stages[stage].is_pending = false;
    restart();
  }
  void restart() {
    used = copied = 0;
    places.clear();
  }
  void upload(cudaStream_t stream) {
    if (used == copied) return;
    DZ_CUDA(cudaMemcpyAsync(device + copied, host() + copied, used - copied, cudaMemcpyHostToDevice,
                            stream));
    copied = used;
    DZ_CUDA(cudaEventRecord(stages[stage].uploaded, stream));
    stages[stage].is_pending = true;
  }
};

StepArgs::StepArgs()
    : eager_(std::make_unique<Arena>()),
      graph_(std::make_unique<Arena>()),
      tail_(std::make_unique<Arena>()) {}

StepArgs::~StepArgs() = default;

void StepArgs::begin(StepMode mode) {
  DZ_INTERNAL(mode_ == StepMode::kEager && mode != StepMode::kEager, "steps do not nest");
  mode_ = mode;
  ++step_;
  ++pass_;
  graph_->turn();
  tail_->turn();
}

void StepArgs::upload(CudaStream& stream) {
  graph_->upload(stream.get());
  tail_->upload(stream.get());
}

std::size_t StepArgs::num_bytes() const { return graph_->used; }

void StepArgs::forget(std::int64_t mark) {
  if (mark != mark_) return;
  ++step_;
  ++pass_;
  will_forget_ = false;
  eager_->restart();
}

void StepArgs::begin_eager(CudaStream& stream) {
  if (stream.mark() == mark_) return;
  mark_ = stream.mark();
  ++step_;
  ++pass_;
  will_forget_ = false;
  eager_->turn();
}

void StepArgs::run_gathered(CudaStream& stream, const std::function<void()>& body) {
  DZ_INTERNAL(mode_ == StepMode::kEager, "steps do not nest");
  begin_eager(stream);
  ++pass_;
  mode_ = StepMode::kGather;
  try {
    body();
  } catch (...) {
    mode_ = StepMode::kEager;
    throw;
  }
  mode_ = StepMode::kEager;
  ++pass_;
  upload_eager(stream);
  body();
}

const void* StepArgs::put_bytes(const void* host, std::size_t num_bytes, CudaStream& stream) {
  if (is_recorded()) return place(*graph_, host, num_bytes, stream);
  begin_eager(stream);
  return place(*eager_, host, num_bytes, stream);
}

const void* StepArgs::put_tail_bytes(const void* host, std::size_t num_bytes, CudaStream& stream) {
  if (!is_recorded()) return put_bytes(host, num_bytes, stream);
  const void* at = place(*tail_, host, num_bytes, stream);
  DZ_INTERNAL(at == tail_->device, "a step has one tail");
  return at;
}

void StepArgs::upload_eager(CudaStream& stream) {
  eager_->upload(stream.get());
  if (!will_forget_) stream.when_passed([this, mark = mark_] { forget(mark); });
  will_forget_ = true;
}

const void* StepArgs::place(Arena& arena, const void* host, std::size_t num_bytes,
                            CudaStream& stream) {
  const auto found = arena.places.find({host, num_bytes});
  if (found != arena.places.end()) {
    const bool is_same = std::memcmp(arena.host() + found->second, host, num_bytes) == 0;
    if (is_same) return arena.device + found->second;
    DZ_INTERNAL(!is_recorded(), "a host array changed within a recorded step");
    arena.places.erase(found);
  }
  DZ_INTERNAL(num_bytes <= kArenaBytes, "an op brings ", num_bytes, " bytes of arguments, at most ",
              kArenaBytes, " are expected");
  if (arena.used + num_bytes > kArenaBytes) {
    DZ_INTERNAL(!is_recorded(), "a recorded step brings more than ", kArenaBytes,
                " bytes of arguments");
    if (mode_ == StepMode::kGather) return nullptr;  // it will come once more, and be copied then
    DZ_CUDA(cudaStreamSynchronize(stream.get()));
    eager_->restart();
  }
  const std::size_t offset = arena.used;
  if (num_bytes > 0) std::memcpy(arena.host() + offset, host, num_bytes);
  arena.used += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  arena.used = std::min(arena.used, kArenaBytes);
  arena.places.emplace(Arena::Key{host, num_bytes}, offset);
  if (mode_ == StepMode::kEager) upload_eager(stream);
  return arena.device + offset;
}

}  // namespace deltazip::cuda
