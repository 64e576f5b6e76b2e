// Rotates q and k (rotate-half) and writes k and v to the cache.

#include "backend/cpu/kernels/table.h"
#include "backend/cpu/kernels/vec.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

DZ_INLINE void rotate(float* head, const float* cosines, const float* sines, std::int64_t half) {
  const auto turn = [&](std::int64_t i, int n) __attribute__((always_inline)) {
    const F32 x = n == kLanes ? load(head + i) : load_first(head + i, n);
    const F32 y = n == kLanes ? load(head + half + i) : load_first(head + half + i, n);
    const F32 c = n == kLanes ? load(cosines + i) : load_first(cosines + i, n);
    const F32 s = n == kLanes ? load(sines + i) : load_first(sines + i, n);
    const F32 new_x = sub(mul(x, c), mul(y, s));
    const F32 new_y = add(mul(y, c), mul(x, s));
    if (n == kLanes) {
      store(head + i, new_x);
      store(head + half + i, new_y);
    } else {
      store_first(head + i, new_x, n);
      store_first(head + half + i, new_y, n);
    }
  };
  std::int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) turn(i, kLanes);
  if (i < half) turn(i, static_cast<int>(half - i));
}

template <DType kType>
void store_head(void* cache, std::int64_t element, const float* head, std::int64_t size) {
  char* out = static_cast<char*>(cache) + element * kBytes<kType>;
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store_as<kType>(out + i * kBytes<kType>, load(head + i));
  }
  if (i < size) {
    char lanes[kLanes * kBytes<kType>];
    store_as<kType>(lanes, load_first(head + i, static_cast<int>(size - i)));
    std::memcpy(out + i * kBytes<kType>, lanes,
                static_cast<std::size_t>((size - i) * kBytes<kType>));
  }
}

template <DType kType>
void append_rows(const RopeAppendParams& params, std::int64_t first, std::int64_t last) {
  const KvLayer& cache = params.cache;
  const std::int64_t size = cache.head_dim, half = size / 2;
  const std::int64_t row_size = (params.num_heads + 2 * cache.num_kv_heads) * size;
  for (std::int64_t row = first; row < last; ++row) {
    float* q = static_cast<float*>(params.qkv) + row * row_size;
    float* k = q + params.num_heads * size;
    const float* v = k + cache.num_kv_heads * size;
    const float* cosines = params.cos_sin + params.angle_rows[row] * size;
    for (int head = 0; head < params.num_heads + cache.num_kv_heads; ++head) {
      rotate(q + head * size, cosines, cosines + half, half);
    }
    if (params.cache_slots[row] < 0) continue;
    const std::int64_t block = params.cache_slots[row] / cache.block_size;
    const std::int64_t offset = params.cache_slots[row] % cache.block_size;
    for (int head = 0; head < cache.num_kv_heads; ++head) {
      const std::int64_t element =
          ((block * cache.num_kv_heads + head) * cache.block_size + offset) * size;
      store_head<kType>(cache.keys, element, k + head * size, size);
      store_head<kType>(cache.values, element, v + head * size, size);
    }
  }
}

}  // namespace

void rope_append(const RopeAppendParams& params, std::int64_t first, std::int64_t last) {
  switch (params.cache.dtype) {
    case DType::kBFloat16:
      return append_rows<DType::kBFloat16>(params, first, last);
    case DType::kFloat16:
      return append_rows<DType::kFloat16>(params, first, last);
    default:
      return append_rows<DType::kFloat32>(params, first, last);
  }
}

}  // namespace deltazip::cpu::DZ_ISA
