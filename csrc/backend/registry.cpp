#include <dlfcn.h>

#include <charconv>
#include <memory>
#include <string>
#include <system_error>

#include "backend/cpu/cpu_backend.h"
#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr const char* kCudaLibrary = "libdeltazip_cuda.so";
constexpr const char* kCudaFactory = "deltazip_make_cuda_backend";
using CudaFactory = Backend*(int device, const BackendOptions& options);

// The folder of the library or program that holds this code, with a '/' at the end.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&make_backend), &info) == 0 ||
      info.dli_fname == nullptr) {
    return "";
  }
  const std::string path = info.dli_fname;
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

// Never closed: the backend's code must outlive every object it made.
void* open_cuda_library() {
  std::string errors;
  for (const std::string& path : {own_folder() + kCudaLibrary, std::string(kCudaLibrary)}) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char* error = dlerror();  // NOLINT(concurrency-mt-unsafe): glibc keeps it per thread
    errors += errors.empty() ? "" : "; ";
    errors += error != nullptr ? error : "unknown error";
  }
  detail::fail<InvalidArgument>("device 'cuda' needs ", kCudaLibrary,
                                ", which a build with DELTAZIP_CUDA=ON makes, and the NVIDIA "
                                "driver; it could not be opened: ",
                                errors);
}

std::unique_ptr<Backend> make_cuda_backend(int device, const BackendOptions& options) {
  void* library = open_cuda_library();
  void* symbol = dlsym(library, kCudaFactory);
  DZ_CHECK(symbol != nullptr, kCudaLibrary, " was found but has no ", kCudaFactory,
           ": it is of another version");
  return std::unique_ptr<Backend>(reinterpret_cast<CudaFactory*>(symbol)(device, options));
}

}  // namespace

std::unique_ptr<Backend> make_backend(std::string_view device, const BackendOptions& options) {
  if (device == "cpu") return cpu::make_cpu_backend(options);
  if (device == "cuda") return make_cuda_backend(0, options);
  if (device.starts_with("cuda:")) {
    const std::string_view number = device.substr(5);
    int index = -1;
    const auto [end, error] = std::from_chars(number.begin(), number.end(), index);
    if (error == std::errc() && end == number.end() && index >= 0) {
      return make_cuda_backend(index, options);
    }
  }
  detail::fail<InvalidArgument>("unknown device '", device, "': expected cpu, cuda or cuda:N");
}

}  // namespace deltazip
