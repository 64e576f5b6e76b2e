#include "deltazip/delta/delta_store.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "delta/store_fixture.h"
#include "deltazip/base/error.h"

namespace deltazip {
namespace {

using test::FakeBackend;
using test::message_of;
using test::small_delta;
using test::Variants;
using test::write_file;

TEST(LayerOf, ReadsTheLayerFromAName) {
  EXPECT_EQ(layer_of("model.layers.0.mlp.up_proj.weight"), 0);
  EXPECT_EQ(layer_of("model.layers.17.input_layernorm.weight"), 17);
  for (const char* name : {"model.embed_tokens.weight", "model.layers", "model.layers.", "lm_head",
                           "model.layers.x.weight", "model.layers.-1.w", "model.layers.1x.w",
                           "model.layers..w", "model.layers.1", "model.layers.99999999999.w", ""}) {
    EXPECT_EQ(layer_of(name), -1) << name;
  }
}

TEST(DeltaStore, LaysEveryTensorDownLayerByLayer) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  const auto host = store.get(handle);
  const auto file = store.file(handle);
  const DeltaSummary& summary = store.summary(handle);
  EXPECT_EQ(summary.path, variants.paths[0].string());
  EXPECT_EQ(summary.content_digest, file->content_digest());
  EXPECT_EQ(summary.file_bytes, std::filesystem::file_size(variants.file(0)));
  EXPECT_EQ(summary.manifest_json, file->manifest_json());
  EXPECT_EQ(summary.tiled_bytes, host->bytes.num_bytes());
  EXPECT_EQ(host->content_digest, file->content_digest());

  std::map<std::size_t, const DeltaPart*> by_offset;
  for (const DeltaPart& part : host->parts) {
    if (part.num_bytes > 0) by_offset[part.offset] = &part;
  }
  std::size_t end = 0;
  std::set<std::int32_t> layers;  // outside of the layers: after all of them
  for (const auto& [offset, part] : by_offset) {
    EXPECT_EQ(offset, (end + 63) / 64 * 64) << part->name;
    end = offset + part->num_bytes;
    const std::int32_t layer = layer_of(part->name) < 0 ? 1000 : layer_of(part->name);
    EXPECT_TRUE(layers.empty() || layer >= *layers.rbegin()) << part->name;
    layers.insert(layer);
  }
  EXPECT_EQ(layers, (std::set<std::int32_t>{0, 1, 1000}));
  EXPECT_EQ((end + 63) / 64 * 64, host->bytes.num_bytes());

  ASSERT_EQ(host->parts.size(), file->tensors().size());
  const auto* bytes = static_cast<const std::byte*>(host->bytes.data());
  for (std::size_t i = 0; i < host->parts.size(); ++i) {
    const DeltaPart& part = host->parts[i];
    const DeltaTensor& tensor = file->tensors()[i];
    EXPECT_EQ(host->find(part.name), &part);
    EXPECT_EQ(part.name, tensor.name);
    EXPECT_EQ(part.kind, tensor.kind);
    EXPECT_EQ(part.offset % 64, 0u);
    if (part.kind == DeltaKind::kUnchanged) {
      EXPECT_EQ(part.num_bytes, 0u);
    }
    if (part.kind == DeltaKind::kReplaced) {
      ASSERT_EQ(part.num_bytes, 4 * static_cast<std::size_t>(part.num_elements));
      const auto* values = reinterpret_cast<const float*>(bytes + part.offset);
      for (std::int64_t j = 0; j < part.num_elements; ++j) {
        const auto* words = static_cast<const std::uint16_t*>(tensor.replaced.data);
        const float expected = tensor.replaced.dtype == DType::kFloat32
                                   ? static_cast<const float*>(tensor.replaced.data)[j]
                               : tensor.replaced.dtype == DType::kFloat16
                                   ? to_float(Half{words[j]})
                                   : to_float(BFloat16{words[j]});
        EXPECT_EQ(values[j], expected) << part.name << " " << j;
      }
    }
    if (part.kind == DeltaKind::kMatrix) {
      EXPECT_EQ(part.matrix.rows, tensor.matrix.rows);
      EXPECT_EQ(part.matrix.columns, tensor.matrix.columns);
      EXPECT_EQ(part.matrix.type, tensor.matrix.type);
      EXPECT_EQ(part.matrix.group_size, tensor.matrix.group_size);
      std::vector<std::byte> tiled(part.num_bytes);
      backend.tile_delta(tiled.data(), tensor.matrix);
      EXPECT_EQ(std::memcmp(tiled.data(), bytes + part.offset, tiled.size()), 0) << part.name;
    }
  }
  EXPECT_EQ(host->find("model.layers"), nullptr);
}

TEST(DeltaStore, RefusesWhatIsNotOfItsBase) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore other(backend, Digest{}, variants.base, 0);
  const auto digest = message_of<InvalidArgument>([&] { other.add(variants.paths[0]); });
  EXPECT_NE(digest.find("another base"), std::string::npos) << digest;
  variants.base.pop_back();
  DeltaStore fewer(backend, variants.base_digest, variants.base, 0);
  EXPECT_THROW(fewer.add(variants.paths[0]), InvalidArgument);
  EXPECT_THROW(fewer.add(variants.folder.path() / "none"), InvalidArgument);
  variants.base.push_back({"model.layers.900000.w", Shape({1})});
  const auto layers = message_of<InvalidArgument>(
      [&] { DeltaStore(backend, variants.base_digest, variants.base, 0); });
  EXPECT_NE(layers.find("layer 900000"), std::string::npos) << layers;
}

TEST(DeltaStore, SeveralThreadsTileTheSameBytes) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore one(backend, variants.base_digest, variants.base, 0);
  const auto expected = one.get(one.add(variants.paths[0]));
  const int num_matrices = backend.num_tiled;
  DeltaStore several(backend, variants.base_digest, variants.base, 0, 5);
  const std::int32_t handle = several.add(variants.paths[0]);
  std::mutex mutex;
  std::set<std::thread::id> threads;
  backend.on_tile = [&] {
    {
      const std::lock_guard lock(mutex);
      threads.insert(std::this_thread::get_id());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // so that the others get some
  };
  const auto host = several.get(handle);
  EXPECT_EQ(backend.num_tiled, 2 * num_matrices);
  EXPECT_GT(threads.size(), 1u);
  ASSERT_EQ(host->parts.size(), expected->parts.size());
  const auto* bytes = static_cast<const std::byte*>(host->bytes.data());
  const auto* right = static_cast<const std::byte*>(expected->bytes.data());
  for (const DeltaPart& part : host->parts) {
    EXPECT_TRUE(
        std::equal(bytes + part.offset, bytes + part.offset + part.num_bytes, right + part.offset))
        << part.name;
  }
  DeltaStore failing(backend, variants.base_digest, variants.base, 0, 3);
  backend.on_tile = [] { throw ResourceExhausted("no more tiles"); };
  EXPECT_THROW(failing.get(failing.add(variants.paths[0])), ResourceExhausted);
  EXPECT_EQ(failing.host_bytes(), 0u);
}

TEST(DeltaStore, UnknownHandlesAreNotFound) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  store.remove(handle);
  EXPECT_THROW(store.get(handle), NotFound);
  EXPECT_THROW(store.summary(handle), NotFound);
  EXPECT_THROW(store.file(-1), NotFound);
  EXPECT_THROW(store.remove(handle), NotFound);
  EXPECT_NE(store.add(variants.paths[0]), handle);  // never used again
}

TEST(DeltaStore, KeepsTheLatestWithinItsBudget) {
  Variants variants(3);
  FakeBackend backend(true);
  std::size_t one = 0;
  {
    DeltaStore probe(backend, variants.base_digest, variants.base, 0);
    one = probe.summary(probe.add(variants.paths[0])).tiled_bytes;
  }
  DeltaStore store(backend, variants.base_digest, variants.base, 2 * one);
  std::vector<std::int32_t> handles;
  for (const auto& path : variants.paths) handles.push_back(store.add(path));
  const auto tiled_by = [&](std::int32_t handle) {
    const int before = backend.num_tiled;
    store.get(handle);
    return backend.num_tiled - before;
  };
  EXPECT_EQ(store.host_bytes(), 0u);
  EXPECT_GT(tiled_by(handles[0]), 0);
  EXPECT_GT(tiled_by(handles[1]), 0);
  EXPECT_EQ(tiled_by(handles[0]), 0);  // now 1 is the oldest
  EXPECT_EQ(store.host_bytes(), 2 * one);
  EXPECT_GT(tiled_by(handles[2]), 0);
  EXPECT_EQ(store.host_bytes(), 2 * one);
  EXPECT_EQ(backend.host_bytes, static_cast<std::int64_t>(2 * one));
  EXPECT_EQ(tiled_by(handles[0]), 0);
  EXPECT_GT(tiled_by(handles[1]), 0);  // it was thrown out
  for (const std::int32_t handle : handles) store.remove(handle);
  EXPECT_EQ(store.host_bytes(), 0u);
  EXPECT_EQ(backend.host_bytes, 0);
}

TEST(DeltaStore, WhatIsInUseIsFoundAgainThoughEvicted) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 1);  // keeps nothing
  const std::int32_t handle = store.add(variants.paths[0]);
  auto used = store.get(handle);
  EXPECT_EQ(store.host_bytes(), 0u);
  const int tiled = backend.num_tiled;
  EXPECT_EQ(store.get(handle), used);
  EXPECT_EQ(backend.num_tiled, tiled);
  store.remove(handle);
  EXPECT_GT(backend.host_bytes, 0);  // still in use
  used.reset();
  EXPECT_EQ(backend.host_bytes, 0);
}

TEST(DeltaStore, ManyWhoAskAtOnceTileOnce) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  std::vector<std::shared_ptr<const HostDelta>> found(4);
  std::vector<std::thread> threads;
  for (auto& mine : found) threads.emplace_back([&] { mine = store.get(handle); });
  for (auto& thread : threads) thread.join();
  for (const auto& mine : found) EXPECT_EQ(mine, found[0]);
  EXPECT_EQ(backend.num_tiled, 6);  // matrices of one delta
}

TEST(DeltaStore, RemovalDuringALoadIsHarmless) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  std::mutex mutex;
  std::condition_variable changed;
  bool has_begun = false, may_go_on = false;
  backend.on_tile = [&] {
    std::unique_lock lock(mutex);
    has_begun = true;
    changed.notify_all();
    changed.wait(lock, [&] { return may_go_on; });
  };
  std::shared_ptr<const HostDelta> host;
  std::thread loader([&] { host = store.get(handle); });
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return has_begun; });
    store.remove(handle);
    may_go_on = true;
    changed.notify_all();
  }
  loader.join();
  ASSERT_NE(host, nullptr);
  EXPECT_NE(host->find("model.norm.weight"), nullptr);
  EXPECT_EQ(store.host_bytes(), 0u);
  host.reset();
  EXPECT_EQ(backend.host_bytes, 0);
}

TEST(DeltaStore, AFileReplacedUnderItsPathChangesNothing) {
  Variants variants(2);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  std::filesystem::rename(variants.file(1), variants.file(0));
  const auto host = store.get(handle);
  const auto again = store.add(variants.paths[0]);
  EXPECT_NE(store.summary(again).content_digest, host->content_digest);
  const DeltaPart* part = host->find("model.norm.weight");
  const auto* bytes = static_cast<const std::byte*>(host->bytes.data()) + part->offset;
  EXPECT_EQ(std::memcmp(bytes, store.file(handle)->find("model.norm.weight")->replaced.data,
                        part->num_bytes),
            0);
  EXPECT_NE(std::memcmp(bytes, store.file(again)->find("model.norm.weight")->replaced.data,
                        part->num_bytes),
            0);
}

TEST(DeltaStore, AFileChangedInPlaceIsRefusedAndOthersGoOn) {
  Variants variants(3);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  std::vector<std::int32_t> handles;
  for (const auto& path : variants.paths) handles.push_back(store.add(path));
  std::filesystem::resize_file(variants.file(0), 100);
  const auto cut = message_of<InvalidArgument>([&] { store.get(handles[0]); });
  EXPECT_NE(cut.find(variants.file(0).string()), std::string::npos) << cut;
  EXPECT_NE(cut.find("has 100 bytes"), std::string::npos) << cut;

  write_file(variants.file(1), small_delta(9).str());
  std::filesystem::last_write_time(
      variants.file(1), std::filesystem::file_time_type::clock::now() + std::chrono::seconds(5));
  const auto written = message_of<InvalidArgument>([&] { store.get(handles[1]); });
  EXPECT_NE(written.find("written to"), std::string::npos) << written;
  EXPECT_NE(store.get(handles[2]), nullptr);
}

TEST(DeltaStore, AFileCutWhileItIsReadIsAnErrorAndNotASignal) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  backend.on_tile = [&] { std::filesystem::resize_file(variants.file(0), 100); };
  const auto message = message_of<InvalidArgument>([&] { store.get(handle); });
  EXPECT_NE(message.find("ends at byte"), std::string::npos) << message;
  EXPECT_EQ(backend.host_bytes, 0);
}

TEST(DeltaStore, FullHostMemoryIsReportedAndPasses) {
  Variants variants(1);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 0);
  const std::int32_t handle = store.add(variants.paths[0]);
  backend.host_is_full = true;
  EXPECT_THROW(store.get(handle), ResourceExhausted);
  EXPECT_EQ(store.host_bytes(), 0u);
  backend.host_is_full = false;
  EXPECT_NE(store.get(handle), nullptr);
}

TEST(DeltaStore, AnUnchangedVariantTakesNoBytes) {
  Variants variants(0);
  test::DeltaBuilder builder;
  builder.unchanged("model.norm.weight", {12});
  const auto path = variants.folder.path() / "d.safetensors";
  write_file(path, builder.str());
  FakeBackend backend(false);
  DeltaStore store(backend, builder.base_digest, {{"model.norm.weight", Shape({12})}}, 0);
  const std::int32_t handle = store.add(path);
  EXPECT_EQ(store.summary(handle).tiled_bytes, 0u);
  const auto host = store.get(handle);
  EXPECT_EQ(host->find("model.norm.weight")->kind, DeltaKind::kUnchanged);
  EXPECT_EQ(backend.host_bytes, 0);
}

// Threads that add, get and remove as they please; then everything must have been given back.
TEST(DeltaStore, RandomWalkOfManyThreads) {
  constexpr int kThreads = 4, kSteps = 150;
  Variants variants(3);
  FakeBackend backend(true);
  DeltaStore store(backend, variants.base_digest, variants.base, 5000);
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < kThreads; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 rng(seed);
      std::vector<std::pair<std::int32_t, std::size_t>> mine;  // handle, variant
      std::vector<std::shared_ptr<const HostDelta>> used;
      for (int step = 0; step < kSteps; ++step) {
        const unsigned dice = rng() % 8;
        if (mine.empty() || dice == 0) {
          const std::size_t which = rng() % variants.paths.size();
          mine.emplace_back(store.add(variants.paths[which]), which);
        } else if (dice == 1) {
          store.remove(mine.back().first);
          mine.pop_back();
        } else if (dice == 2) {
          used.clear();
        } else {
          const auto& [handle, which] = mine[rng() % mine.size()];
          used.push_back(store.get(handle));
          EXPECT_EQ(used.back()->content_digest, store.summary(handle).content_digest);
          EXPECT_EQ(store.summary(handle).path, variants.paths[which].string());
        }
        EXPECT_LE(store.host_bytes(), 5000u);
      }
      for (const auto& [handle, which] : mine) store.remove(handle);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(store.host_bytes(), 0u);
  EXPECT_EQ(backend.host_bytes, 0);
}

}  // namespace
}  // namespace deltazip
