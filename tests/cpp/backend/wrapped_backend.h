#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"

namespace deltazip::test {

// Calls the protected run() of another Ops: what has passed the checks once need not again.
class OpsAccess : public Ops {
 public:
  template <typename Params>
  static void run_on(Ops& ops, const Params& params, Stream& stream) {
    void (Ops::*run)(const Params&, Stream&) = &OpsAccess::run;
    (ops.*run)(params, stream);
  }

 protected:
  using Ops::run;
};

// What decides a launch: the op, its shapes and counts, its device pointers. Not what host arrays
// hold.
inline std::string launch_of(const EmbedParams& p) {
  return detail::concat("embed ", p.num_rows, " ", p.table.data, " ", p.out, " ", p.sampled);
}
inline std::string launch_of(const LinearParams& p) {
  return detail::concat("linear ", p.num_rows, " ", p.x, " ", p.weight.data, " ", p.y);
}
inline std::string launch_of(const SbmmParams& p) {
  return detail::concat("sbmm ", p.num_rows, " ", p.num_tasks, " ", p.x, " ", p.y, " ",
                        p.in_features, " ", p.out_features);
}
inline std::string launch_of(const ProjectParams& p) {
  return launch_of(p.base) + " + " + launch_of(p.deltas);
}
inline std::string launch_of(const RmsNormParams& p) {
  return detail::concat("rms_norm ", p.num_rows, " ", p.x, " ", p.residual, " ", p.out);
}
inline std::string launch_of(const BiasAddParams& p) {
  return detail::concat("bias_add ", p.num_rows, " ", p.y);
}
inline std::string launch_of(const SiluMulParams& p) {
  return detail::concat("silu_mul ", p.num_rows, " ", p.gate_up, " ", p.out);
}
inline std::string launch_of(const RopeAppendParams& p) {
  return detail::concat("rope_append ", p.num_rows, " ", p.qkv, " ", p.cos_sin, " ", p.cache.keys,
                        " ", p.cache.values);
}
inline std::string launch_of(const PagedAttentionParams& p) {
  return detail::concat("paged_attention ", p.num_rows, " ", p.num_sequences, " ", p.qkv, " ",
                        p.out, " ", p.cache.keys, " ", p.cache.values);
}
inline std::string launch_of(const GatherRowsParams& p) {
  return detail::concat("gather_rows ", p.num_rows, " ", p.x, " ", p.out);
}
inline std::string launch_of(const SampleParams& p) {
  return detail::concat("sample ", p.num_rows, " ", p.logits, " ", p.tokens);
}

// Another backend's mathematics, each op shown to `on_op` first.
class WrappedOps : public Ops {
 public:
  explicit WrappedOps(Ops& inner) : inner_(inner) {}
  std::function<void(const std::string& launch)> on_op;
  std::function<void(const SbmmParams& deltas, const Stream& stream)> on_deltas;
  // As on a device that works apart: the host gets a stream's samples only with give_until().
  bool holds_samples = false;
  std::int64_t mark() const { return num_marks_; }
  std::int64_t set_mark() { return num_marks_++; }
  void give_until(std::int64_t mark, const Stream& stream) {
    const std::lock_guard lock(mutex_);
    std::erase_if(held_, [&](const Held& held) {
      if (held.mark > mark || held.stream != &stream) return false;
      std::ranges::copy(held.samples, held.out);
      return true;
    });
  }

 protected:
  void run(const EmbedParams& p, Stream& s) override { pass(p, s); }
  void run(const LinearParams& p, Stream& s) override { pass(p, s); }
  void run(const SbmmParams& p, Stream& s) override {
    if (on_deltas) on_deltas(p, s);
    pass(p, s);
  }
  void run(const ProjectParams& p, Stream& s) override {
    if (on_deltas) on_deltas(p.deltas, s);
    pass(p, s);
  }
  void run(const BiasAddParams& p, Stream& s) override { pass(p, s); }
  void run(const RmsNormParams& p, Stream& s) override { pass(p, s); }
  void run(const SiluMulParams& p, Stream& s) override { pass(p, s); }
  void run(const RopeAppendParams& p, Stream& s) override { pass(p, s); }
  void run(const PagedAttentionParams& p, Stream& s) override { pass(p, s); }
  void run(const GatherRowsParams& p, Stream& s) override { pass(p, s); }
  void run(const SampleParams& p, Stream& s) override {
    if (!holds_samples) return pass(p, s);
    Held held{num_marks_, &s, p.out,
              std::vector<SampledToken>(static_cast<std::size_t>(p.num_rows))};
    SampleParams params = p;
    params.out = held.samples.data();
    pass(params, s);
    SampledToken not_yet;
    not_yet.token = -7;
    not_yet.is_finite = false;
    std::fill_n(p.out, p.num_rows, not_yet);
    const std::lock_guard lock(mutex_);
    held_.push_back(std::move(held));
  }

 private:
  template <typename Params>
  void pass(const Params& params, Stream& stream) {
    if (on_op) on_op(launch_of(params));
    OpsAccess::run_on(inner_, params, stream);
  }
  struct Held {
    std::int64_t mark;
    const Stream* stream;
    SampledToken* out;
    std::vector<SampledToken> samples;
  };

  Ops& inner_;
  std::atomic<std::int64_t> num_marks_ = 0;
  std::mutex mutex_;  // of held_: streams belong to several threads
  std::vector<Held> held_;
};

// Another backend with some answers changed by who derives from it.
class WrappedBackend : public Backend {
 public:
  explicit WrappedBackend(std::unique_ptr<Backend> inner)
      : inner_(std::move(inner)), ops_(inner_->ops()) {}

  WrappedOps& wrapped_ops() { return ops_; }
  Backend& inner() { return *inner_; }
  const Backend& inner() const { return *inner_; }

  std::string description() const override { return inner_->description(); }
  Ops& ops() override { return ops_; }
  MemoryInfo memory_info() const override { return inner_->memory_info(); }
  bool shares_host_memory() const override { return inner_->shares_host_memory(); }
  DType activation_dtype(DType weights) const override { return inner_->activation_dtype(weights); }
  DType packed_dtype(DType dtype) const override { return inner_->packed_dtype(dtype); }
  void check_model(const ModelShape& shape) const override { inner_->check_model(shape); }
  Buffer allocate(std::size_t num_bytes) override { return inner_->allocate(num_bytes); }
  Buffer allocate_host(std::size_t num_bytes) override { return inner_->allocate_host(num_bytes); }
  std::unique_ptr<Stream> create_stream() override { return inner_->create_stream(); }
  std::unique_ptr<Event> create_event() override { return inner_->create_event(); }
  void copy_to_device(void* device, const void* host, std::size_t size, Stream& s) override {
    inner_->copy_to_device(device, host, size, s);
  }
  void copy_to_host(void* host, const void* device, std::size_t size, Stream& s) override {
    inner_->copy_to_host(host, device, size, s);
  }
  void copy_on_device(void* to, const void* from, std::size_t size, Stream& s) override {
    inner_->copy_on_device(to, from, size, s);
  }
  void run_step(const StepKey& key, Stream& stream, const std::function<void()>& body) override {
    inner_->run_step(key, stream, body);
  }
  void run_once(Stream& stream, const std::function<void()>& body) override {
    inner_->run_once(stream, body);
  }
  std::int32_t padded_rows(std::int32_t num_rows) const override {
    return inner_->padded_rows(num_rows);
  }
  std::size_t packed_bytes(DType dtype, std::int64_t rows, std::int64_t columns) const override {
    return inner_->packed_bytes(dtype, rows, columns);
  }
  void pack_weight(void* device, ConstTensorView host, Stream& stream) override {
    inner_->pack_weight(device, host, stream);
  }
  DeltaType tiled_type(DeltaType type) const override { return inner_->tiled_type(type); }
  std::size_t tiled_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                          std::int32_t group_size) const override {
    return inner_->tiled_bytes(type, rows, columns, group_size);
  }
  void tile_delta(void* host, const DeltaSource& source) const override {
    inner_->tile_delta(host, source);
  }

 private:
  std::unique_ptr<Backend> inner_;
  WrappedOps ops_;
};

}  // namespace deltazip::test
