// Passes over one row of logits: maxima, sums of exponentials, counts, selections.

#include "backend/cpu/kernels/table.h"
#include "backend/cpu/kernels/vec.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

DZ_INLINE float minus_infinity() { return bits_to_float(0xFF800000u); }

// Sixteen values from i on; past the end -inf.
DZ_INLINE F32 load_padded(const float* values, std::int64_t i, std::int64_t size) {
  if (i + kLanes <= size) return load(values + i);
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = i + j < size ? values[i + j] : minus_infinity();
  return load(lanes);
}

}  // namespace

LogitSummary summarise_logits(const float* logits, std::int64_t size) {
  const F32 largest = set1(bits_to_float(0x7F7FFFFFu));
  F32 top = set1(minus_infinity());
  unsigned finite = 0xFFFFu;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const F32 v = load_padded(logits, i, size);
    finite &= mask_less_equal(v, largest);
    top = max(v, top);
  }
  const float max_value = reduce_max(top);
  return {max_value, finite == 0xFFFFu && max_value >= bits_to_float(0xFF7FFFFFu)};
}

std::int64_t argmax(const float* values, std::int64_t size) {
  F32 top = set1(minus_infinity());
  for (std::int64_t i = 0; i < size; i += kLanes) top = max(load_padded(values, i, size), top);
  const F32 best = set1(reduce_max(top));
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const unsigned mask = mask_equal(load_padded(values, i, size), best);
    if (mask != 0) return i + __builtin_ctz(mask);
  }
  return 0;
}

std::int64_t count_greater(const float* values, std::int64_t size, float bound) {
  const F32 limit = set1(bound);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    count += __builtin_popcount(mask_less(limit, load_padded(values, i, size)));
  }
  return count;
}

double exp_scaled(float* out, const float* values, std::int64_t size, float max_value,
                  float inverse_temperature) {
  const F32 offset = set1(max_value), factor = set1(inverse_temperature);
  double total = 0.0;
  for (std::int64_t i = 0; i < size;) {  // short float sums, a double total
    const std::int64_t end = i + 1024 < size ? i + 1024 : size;
    F32 sum = zero();
    for (; i < end; i += kLanes) {
      const F32 weight = exp(mul(sub(load_padded(values, i, size), offset), factor));
      sum = add(sum, weight);
      if (out == nullptr) continue;
      if (i + kLanes <= size) {
        store(out + i, weight);
      } else {
        store_first(out + i, weight, static_cast<int>(size - i));
      }
    }
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

std::int64_t collect_greater(std::int32_t* indices, const float* values, std::int64_t size,
                             float bound) {
  const F32 limit = set1(bound);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    for (unsigned mask = mask_less(limit, load_padded(values, i, size)); mask != 0;
         mask &= mask - 1) {
      indices[count++] = static_cast<std::int32_t>(i + __builtin_ctz(mask));
    }
  }
  return count;
}

}  // namespace deltazip::cpu::DZ_ISA
