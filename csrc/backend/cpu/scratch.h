#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace deltazip::cpu {

inline constexpr std::size_t kAlignment = 64;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// 64-byte aligned; nullptr when there is no memory.
inline void* allocate_aligned(std::size_t num_bytes) {
  const std::size_t rounded = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  return std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
}

// One worker's memory, kept between calls; only grows. Contents are undefined.
class Scratch {
 public:
  float* floats(std::int64_t count) {
    if (count > capacity_) {
      data_.reset();
      data_.reset(
          static_cast<float*>(allocate_aligned(sizeof(float) * static_cast<std::size_t>(count))));
      capacity_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float, FreeDeleter> data_;
  std::int64_t capacity_ = 0;
};

}  // namespace deltazip::cpu
