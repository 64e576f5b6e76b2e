#include "allocation_meter.h"

#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace {

std::size_t alive = 0, alive_at_reset = 0, peak = 0;

void* give(void* memory) {
  if (memory == nullptr) throw std::bad_alloc();
  alive += malloc_usable_size(memory);
  peak = std::max(peak, alive);
  return memory;
}

void take(void* memory) {
  if (memory == nullptr) return;
  alive -= malloc_usable_size(memory);
  std::free(memory);
}

}  // namespace

void* operator new(std::size_t size) { return give(std::malloc(size == 0 ? 1 : size)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  const auto unit = static_cast<std::size_t>(alignment);
  return give(std::aligned_alloc(unit, (size + unit - 1) / unit * unit));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  void* memory = std::malloc(size == 0 ? 1 : size);
  return memory == nullptr ? nullptr : give(memory);
}
void operator delete(void* memory) noexcept { take(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { take(memory); }
void operator delete(void* memory, std::size_t) noexcept { take(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { take(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { take(memory); }

namespace deltazip::test {

void reset_allocation_peak() {
  alive_at_reset = alive;
  peak = alive;
}

std::size_t allocation_peak() { return peak - alive_at_reset; }

}  // namespace deltazip::test
