#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace deltazip {

// A regular file, open for reading. The descriptor outlives a rename or removal of the path.
class OpenedFile {
 public:
  explicit OpenedFile(const std::filesystem::path& path);  // throws InvalidArgument
  ~OpenedFile();
  OpenedFile(const OpenedFile&) = delete;
  OpenedFile& operator=(const OpenedFile&) = delete;

  const std::string& name() const { return name_; }
  std::size_t num_bytes() const { return num_bytes_; }  // when it was opened
  int descriptor() const { return descriptor_; }

  // Fills `out` from `offset` on. A file cut short meanwhile is an InvalidArgument here, where
  // touching its mapping would be a SIGBUS.
  void read(std::size_t offset, std::span<std::byte> out) const;
  // Throws InvalidArgument when size or modification time differ from those at opening.
  void check_unchanged() const;

 private:
  std::string name_;
  int descriptor_ = -1;
  std::size_t num_bytes_ = 0;
  std::int64_t modified_seconds_ = 0, modified_nanoseconds_ = 0;
};

// The same file as read-only memory. Pages come in as they are touched.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const OpenedFile& file() const { return file_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  OpenedFile file_;
  std::span<const std::byte> bytes_;
};

}  // namespace deltazip
