#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

std::string reason(int code) { return std::generic_category().message(code); }

}  // namespace

OpenedFile::OpenedFile(const std::filesystem::path& path) : name_(path.string()) {
  // Not blocking: opening a FIFO must not wait for a writer.
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  DZ_CHECK(descriptor_ >= 0, "cannot open '", name_, "': ", reason(errno));
  struct stat status{};
  const bool ok = ::fstat(descriptor_, &status) == 0;
  if (!ok || !S_ISREG(status.st_mode)) {
    const std::string why = ok ? "not a regular file" : reason(errno);
    ::close(descriptor_);
    detail::fail<InvalidArgument>("cannot read '", name_, "': ", why);
  }
  num_bytes_ = static_cast<std::size_t>(status.st_size);
  modified_seconds_ = status.st_mtim.tv_sec;
  modified_nanoseconds_ = status.st_mtim.tv_nsec;
}

OpenedFile::~OpenedFile() { ::close(descriptor_); }

void OpenedFile::read(std::size_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t got = ::pread(descriptor_, out.data(), out.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    DZ_CHECK(got >= 0, "cannot read '", name_, "' at byte ", offset, ": ", reason(errno));
    DZ_CHECK(got > 0, "'", name_, "' ends at byte ", offset, ", it had ", num_bytes_,
             " bytes when it was opened");
    offset += static_cast<std::size_t>(got);
    out = out.subspan(static_cast<std::size_t>(got));
  }
}

void OpenedFile::check_unchanged() const {
  struct stat status{};
  DZ_CHECK(::fstat(descriptor_, &status) == 0, "cannot read '", name_, "': ", reason(errno));
  DZ_CHECK(static_cast<std::size_t>(status.st_size) == num_bytes_, "'", name_, "' has ",
           status.st_size, " bytes, it had ", num_bytes_, " when it was opened");
  DZ_CHECK(
      status.st_mtim.tv_sec == modified_seconds_ && status.st_mtim.tv_nsec == modified_nanoseconds_,
      "'", name_, "' was written to after it was opened");
}

MappedFile::MappedFile(const std::filesystem::path& path) : file_(path) {
  if (file_.num_bytes() == 0) return;  // mmap refuses an empty range
  void* data = ::mmap(nullptr, file_.num_bytes(), PROT_READ, MAP_PRIVATE, file_.descriptor(), 0);
  DZ_CHECK(data != MAP_FAILED, "cannot map '", file_.name(), "' (", file_.num_bytes(),
           " bytes): ", reason(errno));
  bytes_ = {static_cast<const std::byte*>(data), file_.num_bytes()};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace deltazip
