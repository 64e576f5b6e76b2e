#include "deltazip/delta/delta_cache.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "delta/store_fixture.h"
#include "deltazip/base/error.h"

namespace deltazip {
namespace {

using test::FakeBackend;
using test::Variants;

constexpr int kLongMs = 30'000;

// A door that the loader thread waits at until the test opens it.
class Door {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return is_open_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    is_open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_open_ = false;
};

class DeltaCacheTest : public testing::TestWithParam<bool> {
 protected:
  Variants variants{3};
  FakeBackend backend{GetParam()};
  DeltaStore store{backend, variants.base_digest, variants.base, 0};
  std::vector<std::int32_t> handles;

  void SetUp() override {
    for (const auto& path : variants.paths) handles.push_back(store.add(path));
  }
  // Waits for `count` loads.
  static std::vector<DeltaCache::Finished> finish(DeltaCache& cache, std::size_t count) {
    std::vector<DeltaCache::Finished> all;
    while (all.size() < count && cache.wait(kLongMs)) {
      for (auto& finished : cache.poll()) all.push_back(std::move(finished));
    }
    return all;
  }
};

INSTANTIATE_TEST_SUITE_P(Memory, DeltaCacheTest, testing::Bool(), [](const auto& tested) {
  return tested.param ? std::string("Shared") : std::string("Separate");
});

TEST_P(DeltaCacheTest, ASlotHoldsTheBytesOfItsDelta) {
  DeltaCache cache(backend, store, 2);
  cache.begin_load(1, handles[0]);
  EXPECT_EQ(cache.get(1), nullptr);
  const auto finished = finish(cache, 1);
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_EQ(finished[0].slot, 1);
  EXPECT_EQ(finished[0].error, "");
  EXPECT_GE(finished[0].seconds, 0.0);
  EXPECT_EQ(cache.get(0), nullptr);
  const DeviceDelta* delta = cache.get(1);
  ASSERT_NE(delta, nullptr);

  const auto host = store.get(handles[0]);
  EXPECT_EQ(delta->host, host);
  if (GetParam()) {
    EXPECT_EQ(delta->base, host->bytes.data());
    EXPECT_EQ(backend.device_bytes, 0);
  } else {
    EXPECT_NE(delta->base, host->bytes.data());
    EXPECT_EQ(backend.device_bytes, static_cast<std::int64_t>(host->bytes.num_bytes()));
  }
  for (const DeltaPart& part : host->parts) {
    EXPECT_EQ(delta->find(part.name), &part);
    const auto* expected = static_cast<const std::byte*>(host->bytes.data()) + part.offset;
    const void* found = nullptr;
    if (part.kind == DeltaKind::kMatrix) {
      const DeltaMatrix matrix = delta->matrix(part);
      EXPECT_EQ(matrix.rows, part.matrix.rows);
      EXPECT_EQ(matrix.type, part.matrix.type);
      found = matrix.data;
      EXPECT_THROW(delta->replaced(part), InternalError);
    } else if (part.kind == DeltaKind::kReplaced) {
      found = delta->replaced(part);
      EXPECT_THROW(delta->matrix(part), InternalError);
    } else {
      continue;
    }
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(found) % 64, 0u);
    EXPECT_EQ(std::memcmp(found, expected, part.num_bytes), 0) << part.name;
  }
}

// Short pieces, one at a time, so that other copies get between them, and every byte in its place.
TEST_P(DeltaCacheTest, ALargeDeltaComesInPieces) {
  test::TemporaryFolder folder;
  const auto path = folder.path() / "delta.safetensors";
  test::DeltaBuilder builder;
  builder.replaced("model.norm.weight", "F32", {2'500'000}).unchanged("lm_head.weight", {2, 2});
  test::write_file(path, builder.str());
  DeltaStore large(backend, builder.base_digest,
                   {{"lm_head.weight", Shape({2, 2})}, {"model.norm.weight", Shape({2'500'000})}},
                   0);
  int num_copies = 0, num_done = 0;
  backend.on_copy = [&] { EXPECT_EQ(num_done, num_copies++) << "a piece is still under way"; };
  backend.on_synchronize = [&] { ++num_done; };
  DeltaCache cache(backend, large, 1);
  const std::int32_t handle = large.add(path);
  cache.begin_load(0, handle);
  ASSERT_EQ(finish(cache, 1).at(0).error, "");
  const auto host = large.get(handle);
  ASSERT_EQ(host->bytes.num_bytes(), 10'000'000U);
  EXPECT_EQ(std::memcmp(cache.get(0)->base, host->bytes.data(), host->bytes.num_bytes()), 0);
  EXPECT_EQ(num_copies, GetParam() ? 0 : 3);
  EXPECT_EQ(num_done, num_copies);
}

TEST_P(DeltaCacheTest, LoadsDoNotStallTheirCaller) {
  Door door;
  backend.on_tile = [&] { door.pass(); };
  DeltaCache cache(backend, store, 3);
  for (std::int32_t slot = 0; slot < 3; ++slot) {
    cache.begin_load(slot, handles[static_cast<std::size_t>(slot)]);
  }
  EXPECT_TRUE(cache.poll().empty());
  EXPECT_FALSE(cache.wait(1));  // timed out
  door.open();
  const auto finished = finish(cache, 3);
  ASSERT_EQ(finished.size(), 3u);
  for (std::int32_t slot = 0; slot < 3; ++slot) {  // in the order they were given
    EXPECT_EQ(finished[static_cast<std::size_t>(slot)].slot, slot);
    EXPECT_EQ(cache.get(slot)->host->content_digest,
              store.summary(handles[static_cast<std::size_t>(slot)]).content_digest);
  }
  EXPECT_FALSE(cache.wait(kLongMs));  // nothing is loading: at once
}

TEST_P(DeltaCacheTest, DroppingFreesTheBytes) {
  DeltaCache cache(backend, store, 1);
  cache.begin_load(0, handles[0]);
  ASSERT_EQ(finish(cache, 1).size(), 1u);
  store.remove(handles[0]);
  EXPECT_GT(backend.host_bytes, 0);
  EXPECT_NE(cache.get(0), nullptr);  // a slot keeps what it holds
  cache.drop(0);
  EXPECT_EQ(cache.get(0), nullptr);
  EXPECT_EQ(backend.host_bytes, 0);
  EXPECT_EQ(backend.device_bytes, 0);
  cache.drop(0);  // an empty slot may be dropped
}

TEST_P(DeltaCacheTest, FailuresAreReportedAndTheSlotServesOn) {
  DeltaCache cache(backend, store, 2);
  std::filesystem::resize_file(variants.file(0), 100);
  cache.begin_load(0, handles[0]);
  cache.begin_load(1, 12345);
  auto finished = finish(cache, 2);
  ASSERT_EQ(finished.size(), 2u);
  EXPECT_NE(finished[0].error.find(variants.file(0).string()), std::string::npos);
  EXPECT_NE(finished[1].error.find("12345"), std::string::npos);
  EXPECT_EQ(cache.get(0), nullptr);
  EXPECT_EQ(cache.get(1), nullptr);

  backend.host_is_full = true;
  cache.begin_load(0, handles[1]);
  finished = finish(cache, 1);
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_NE(finished[0].error.find("full"), std::string::npos);
  backend.host_is_full = false;
  cache.begin_load(0, handles[1]);
  finished = finish(cache, 1);
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_EQ(finished[0].error, "");
  EXPECT_NE(cache.get(0), nullptr);
}

TEST_P(DeltaCacheTest, AFullDeviceIsReported) {
  if (GetParam()) GTEST_SKIP() << "shared memory has no device to fill";
  DeltaCache cache(backend, store, 1);
  backend.device_is_full = true;
  cache.begin_load(0, handles[0]);
  const auto finished = finish(cache, 1);
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_NE(finished[0].error.find("full"), std::string::npos);
  EXPECT_EQ(cache.get(0), nullptr);
}

TEST_P(DeltaCacheTest, ALoadReplacesWhatTheSlotHeld) {
  DeltaCache cache(backend, store, 1);
  for (const std::int32_t handle : handles) {
    cache.begin_load(0, handle);
    EXPECT_EQ(cache.get(0), nullptr);
    ASSERT_EQ(finish(cache, 1).size(), 1u);
    EXPECT_EQ(cache.get(0)->host->content_digest, store.summary(handle).content_digest);
  }
  const auto one = static_cast<std::int64_t>(store.summary(handles[0]).tiled_bytes);
  EXPECT_EQ(backend.device_bytes, GetParam() ? 0 : one);
}

TEST_P(DeltaCacheTest, MisuseIsAnError) {
  Door door;
  backend.on_tile = [&] { door.pass(); };
  DeltaCache cache(backend, store, 1);
  for (const std::int32_t slot : {-1, 1}) {
    EXPECT_THROW(cache.begin_load(slot, handles[0]), InvalidArgument);
    EXPECT_THROW(cache.drop(slot), InvalidArgument);
    EXPECT_THROW(cache.get(slot), InvalidArgument);
  }
  cache.begin_load(0, handles[0]);
  EXPECT_THROW(cache.begin_load(0, handles[1]), InternalError);
  EXPECT_THROW(cache.drop(0), InternalError);
  door.open();
  EXPECT_EQ(finish(cache, 1).size(), 1u);
  EXPECT_THROW(DeltaCache(backend, store, -1), InvalidArgument);
}

TEST_P(DeltaCacheTest, EndsWhileLoadsAreUnderWay) {
  Door door;
  std::atomic<bool> has_begun = false;
  backend.on_tile = [&] {
    has_begun = true;
    door.pass();
  };
  {
    DeltaCache cache(backend, store, 3);
    for (std::int32_t slot = 0; slot < 3; ++slot) {
      cache.begin_load(slot, handles[static_cast<std::size_t>(slot)]);
    }
    while (!has_begun) std::this_thread::yield();
    door.open();
  }
  for (const std::int32_t handle : handles) store.remove(handle);
  EXPECT_EQ(backend.host_bytes, 0);
  EXPECT_EQ(backend.device_bytes, 0);
}

// Slots loaded, dropped and looked at as an engine would, while other threads use the store.
TEST_P(DeltaCacheTest, RandomWalk) {
  constexpr std::int32_t kSlots = 4;
  DeltaCache cache(backend, store, kSlots);
  std::atomic<bool> is_done = false;
  std::thread other([&] {
    std::mt19937 rng(7);
    while (!is_done) {
      const std::int32_t handle = store.add(variants.paths[rng() % variants.paths.size()]);
      EXPECT_NE(store.get(handle), nullptr);
      store.remove(handle);
    }
  });
  std::mt19937 rng(11);
  std::map<std::int32_t, std::int32_t> loading, resident;  // slot -> handle
  for (int step = 0; step < 400; ++step) {
    const auto slot = static_cast<std::int32_t>(rng() % kSlots);
    const std::int32_t handle = handles[rng() % handles.size()];
    if (!loading.contains(slot) && rng() % 2 == 0) {
      cache.begin_load(slot, handle);
      resident.erase(slot);
      loading[slot] = handle;
    } else if (!loading.contains(slot) && rng() % 4 == 0) {
      cache.drop(slot);
      resident.erase(slot);
    } else if (rng() % 2 == 0) {
      cache.wait(1);
    }
    for (const auto& finished : cache.poll()) {
      EXPECT_EQ(finished.error, "");
      ASSERT_TRUE(loading.contains(finished.slot));
      resident[finished.slot] = loading[finished.slot];
      loading.erase(finished.slot);
    }
    for (std::int32_t s = 0; s < kSlots; ++s) {
      const DeviceDelta* delta = cache.get(s);
      ASSERT_EQ(delta != nullptr, resident.contains(s));
      if (delta != nullptr) {
        EXPECT_EQ(delta->host->content_digest, store.summary(resident[s]).content_digest);
      }
    }
  }
  is_done = true;
  other.join();
}

}  // namespace
}  // namespace deltazip
