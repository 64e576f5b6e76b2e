#include "backend/cuda/cublaslt.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "backend/cuda/cublaslt_api.h"
#include "backend/cuda/cuda_check.h"
#include "backend/cuda/measure.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

// More than the 50 MB of L2, so that the same bytes serve to empty it between measurements.
constexpr std::size_t kWorkspaceBytes = std::size_t{64} << 20;
constexpr int kMaxCandidates = 8;
// Up to so many rows a product is its weights' bytes, and takes microseconds.
constexpr std::int64_t kFewTokens = 128;
constexpr int kFewTokenRepetitions = 5;
constexpr std::int64_t kManyTokens = 2048;
// Of many rows all candidates run once, those within 5 % of the best twice more.
constexpr float kCloseToBest = 1.05F;
constexpr int kManyTokenRepetitions = 2;

// A major version of the library goes with one of the toolkit.
constexpr int kMajorVersion = CUDART_VERSION / 1000;
const std::string kLibrary = "libcublasLt.so." + std::to_string(kMajorVersion);

// The folder of the library or program that holds this code, with a '/' at the end.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) {
    return "";
  }
  const std::string path = info.dli_fname;
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

// The loader's own search first (what the process has loaded already, LD_LIBRARY_PATH, the system),
// then where the pip wheels stand beside this package, then the toolkit. Never closed.
void* open_library() {
  const std::string beside = own_folder() + "../nvidia/";
  const std::string cuda = "cu" + std::to_string(kMajorVersion);
  const std::array<std::string, 4> paths = {kLibrary, beside + cuda + "/lib/" + kLibrary,
                                            beside + "cublas/lib/" + kLibrary,
                                            "/usr/local/cuda/lib64/" + kLibrary};
  std::string errors;
  for (const std::string& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char* error = dlerror();  // NOLINT(concurrency-mt-unsafe): glibc keeps it per thread
    errors += errors.empty() ? "" : "; ";
    errors += error != nullptr ? error : "unknown error";
  }
  detail::fail<InvalidArgument>("device 'cuda' needs ", kLibrary,
                                " (CUDA toolkit, or pip install nvidia-cublas); it could not be "
                                "opened: ",
                                errors);
}

struct Api {
  void* library = open_library();
  template <typename F>
  F* find(const char* name) const {
    void* symbol = dlsym(library, name);
    DZ_CHECK(symbol != nullptr, kLibrary, " was found but has no ", name);
    return reinterpret_cast<F*>(symbol);
  }
  lt::Create* const create = find<lt::Create>("cublasLtCreate");
  lt::Destroy* const destroy = find<lt::Destroy>("cublasLtDestroy");
  lt::GetStatusString* const get_status_string =
      find<lt::GetStatusString>("cublasLtGetStatusString");
  lt::GetVersion* const get_version = find<lt::GetVersion>("cublasLtGetVersion");
  lt::Matmul* const matmul = find<lt::Matmul>("cublasLtMatmul");
  lt::MatmulAlgoCheck* const matmul_algo_check =
      find<lt::MatmulAlgoCheck>("cublasLtMatmulAlgoCheck");
  lt::MatmulAlgoGetHeuristic* const matmul_algo_get_heuristic =
      find<lt::MatmulAlgoGetHeuristic>("cublasLtMatmulAlgoGetHeuristic");
  lt::MatmulDescCreate* const matmul_desc_create =
      find<lt::MatmulDescCreate>("cublasLtMatmulDescCreate");
  lt::MatmulDescDestroy* const matmul_desc_destroy =
      find<lt::MatmulDescDestroy>("cublasLtMatmulDescDestroy");
  lt::MatmulDescSetAttribute* const matmul_desc_set_attribute =
      find<lt::MatmulDescSetAttribute>("cublasLtMatmulDescSetAttribute");
  lt::MatmulPreferenceCreate* const matmul_preference_create =
      find<lt::MatmulPreferenceCreate>("cublasLtMatmulPreferenceCreate");
  lt::MatmulPreferenceDestroy* const matmul_preference_destroy =
      find<lt::MatmulPreferenceDestroy>("cublasLtMatmulPreferenceDestroy");
  lt::MatmulPreferenceSetAttribute* const matmul_preference_set_attribute =
      find<lt::MatmulPreferenceSetAttribute>("cublasLtMatmulPreferenceSetAttribute");
  lt::MatrixLayoutCreate* const matrix_layout_create =
      find<lt::MatrixLayoutCreate>("cublasLtMatrixLayoutCreate");
  lt::MatrixLayoutDestroy* const matrix_layout_destroy =
      find<lt::MatrixLayoutDestroy>("cublasLtMatrixLayoutDestroy");

  void check(lt::Status status, const char* what) const {
    if (status == lt::kSuccess) return;
    detail::fail<InternalError>("cuBLASLt: ", what, ": ", get_status_string(status));
  }
};

cudaDataType_t data_type(DType dtype) {
  if (dtype == DType::kFloat32) return CUDA_R_32F;
  return dtype == DType::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
}

// The library takes more bytes at once where it may rely on alignment; 256 is the most it asks for.
std::uint32_t alignment(const void* pointer) {
  const auto address = std::bit_cast<std::uintptr_t>(pointer);
  return static_cast<std::uint32_t>(std::min<std::uintptr_t>(256, address & (~address + 1)));
}

// Column-major as the library sees it: y^T [out, tokens] = weight (transposed) * x^T [in, tokens].
struct Problem {
  Problem(const Api& api_in, const LtProduct& p) : api(api_in) {
    const auto unsigned_of = [](std::int64_t n) { return static_cast<std::uint64_t>(n); };
    api.check(api.matmul_desc_create(&operation, lt::kComputeFloat32, CUDA_R_32F),
              "MatmulDescCreate");
    const std::int32_t transposed = lt::kTransposed;
    api.check(
        api.matmul_desc_set_attribute(operation, lt::kTransposeA, &transposed, sizeof(transposed)),
        "TRANSA");
    api.check(api.matrix_layout_create(&weight, data_type(p.dtype), unsigned_of(p.in_features),
                                       unsigned_of(p.out_features), p.in_features),
              "layout of the weight");
    api.check(api.matrix_layout_create(&x, data_type(p.dtype), unsigned_of(p.in_features),
                                       unsigned_of(p.num_tokens), p.in_features),
              "layout of x");
    api.check(api.matrix_layout_create(&y, data_type(p.y_dtype), unsigned_of(p.out_features),
                                       unsigned_of(p.num_tokens), p.y_stride),
              "layout of y");
  }
  ~Problem() {
    if (y != nullptr) api.matrix_layout_destroy(y);
    if (x != nullptr) api.matrix_layout_destroy(x);
    if (weight != nullptr) api.matrix_layout_destroy(weight);
    if (operation != nullptr) api.matmul_desc_destroy(operation);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  const Api& api;
  lt::Operation operation = nullptr;
  lt::Layout weight = nullptr, x = nullptr, y = nullptr;
};

using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType, DType,
                       std::uint32_t, std::uint32_t, std::uint32_t>;

Key key_of(const LtProduct& p) {
  const auto tokens = CublasLt::bucket(p.num_tokens);
  return {tokens,    p.in_features,  p.out_features,      p.y_stride,    p.dtype,
          p.y_dtype, alignment(p.x), alignment(p.weight), alignment(p.y)};
}

// Tiles that suit the top of a wide bucket need not suit its bottom, which is half as much work.
bool represents_bucket(std::int64_t num_tokens) {
  return num_tokens <= kFewTokens || 4 * num_tokens >= 3 * CublasLt::bucket(num_tokens);
}

}  // namespace

struct CublasLt::Impl {
  struct Choice {
    std::optional<lt::Algorithm> algorithm;  // none: the library has none
    std::int64_t num_tokens = 0;             // for which it was asked
    bool is_final = false;                   // measured, or without alternative
  };

  Impl() {
    api.check(api.create(&handle), "Create");
    DZ_CUDA(cudaMalloc(&workspace, kWorkspaceBytes));
  }
  ~Impl() {
    cudaFree(workspace);
    api.destroy(handle);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::vector<lt::Algorithm> candidates(const Problem& problem, const LtProduct& product);
  Choice first_choice(const LtProduct& product, std::int64_t num_tokens);
  Choice measured_choice(const LtProduct& product, cudaStream_t stream);
  const Choice& choose(const LtProduct& product, LtChoice how, cudaStream_t stream);
  lt::Status launch(const Problem& problem, const LtProduct& p, const lt::Algorithm& algorithm,
                    cudaStream_t stream) {
    const float one = 1.0F, zero = 0.0F;
    return api.matmul(handle, problem.operation, &one, p.weight, problem.weight, p.x, problem.x,
                      &zero, p.y, problem.y, p.y, problem.y, &algorithm, workspace, kWorkspaceBytes,
                      stream);
  }

  Api api;
  lt::Handle handle = nullptr;
  void* workspace = nullptr;
  std::map<Key, Choice> choices;
};

std::vector<lt::Algorithm> CublasLt::Impl::candidates(const Problem& problem,
                                                      const LtProduct& product) {
  lt::Preference preference = nullptr;
  api.check(api.matmul_preference_create(&preference), "MatmulPreferenceCreate");
  const auto set = [&](int attribute, const auto& value) {
    api.matmul_preference_set_attribute(preference, attribute, &value, sizeof(value));
  };
  set(lt::kMaxWorkspaceBytes, std::uint64_t{kWorkspaceBytes});
  const void* operands[] = {product.weight, product.x, product.y, product.y};
  for (std::size_t i = 0; i < std::size(operands); ++i) {
    set(lt::kMinAlignments[i], alignment(operands[i]));
  }
  std::array<lt::HeuristicResult, kMaxCandidates> results{};
  int count = 0;
  const lt::Status status =
      api.matmul_algo_get_heuristic(handle, problem.operation, problem.weight, problem.x, problem.y,
                                    problem.y, preference, kMaxCandidates, results.data(), &count);
  api.matmul_preference_destroy(preference);
  std::vector<lt::Algorithm> out;
  if (status != lt::kSuccess) return out;  // NOT_SUPPORTED: no algorithm
  for (int i = 0; i < count; ++i) {
    const lt::HeuristicResult& result = results[static_cast<std::size_t>(i)];
    if (result.state == lt::kSuccess) out.push_back(result.algorithm);
  }
  return out;
}

CublasLt::Impl::Choice CublasLt::Impl::first_choice(const LtProduct& product,
                                                    std::int64_t num_tokens) {
  LtProduct other = product;
  other.num_tokens = num_tokens;
  const std::vector<lt::Algorithm> all = candidates(Problem(api, other), other);
  Choice choice{std::nullopt, num_tokens, all.size() <= 1};
  if (!all.empty()) choice.algorithm = all.front();
  return choice;
}

CublasLt::Impl::Choice CublasLt::Impl::measured_choice(const LtProduct& product,
                                                       cudaStream_t stream) {
  const Problem problem(api, product);
  const std::vector<lt::Algorithm> all = candidates(problem, product);
  std::vector<float> times(all.size(), std::numeric_limits<float>::infinity());
  const auto time = [&](std::size_t i, int repetitions) {
    const auto run = [&] { api.check(launch(problem, product, all[i], stream), "Matmul"); };
    times[i] = std::min(times[i], least_ms(run, repetitions, workspace, kWorkspaceBytes, stream));
  };
  const bool is_short = product.num_tokens <= kFewTokens;
  for (std::size_t i = 0; i < all.size(); ++i) {
    // An algorithm runs once unmeasured: its code is loaded then.
    if (launch(problem, product, all[i], stream) != lt::kSuccess) continue;
    time(i, is_short ? kFewTokenRepetitions : 1);
  }
  Choice choice{std::nullopt, product.num_tokens, true};
  if (all.empty()) return choice;
  if (!is_short) {
    const float bound = kCloseToBest * *std::ranges::min_element(times);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (times[i] <= bound) time(i, kManyTokenRepetitions);
    }
  }
  choice.algorithm = all[static_cast<std::size_t>(std::ranges::min_element(times) - times.begin())];
  return choice;
}

const CublasLt::Impl::Choice& CublasLt::Impl::choose(const LtProduct& product, LtChoice how,
                                                     cudaStream_t stream) {
  const Key key = key_of(product);
  const bool measures = how == LtChoice::kMeasure && represents_bucket(product.num_tokens);
  auto known = choices.find(key);
  if (known == choices.end()) {
    known = choices.emplace(key, first_choice(product, CublasLt::bucket(product.num_tokens))).first;
  }
  if (measures && !known->second.is_final) known->second = measured_choice(product, stream);
  return known->second;
}

CublasLt::CublasLt() : impl_(std::make_unique<Impl>()) {}
CublasLt::~CublasLt() = default;

// Four buckets an octave: with an algorithm for 512 rows, 288 take half as long again as with one
// for 320. Beyond kManyTokens any large tile does, within 3 %.
std::int64_t CublasLt::bucket(std::int64_t num_tokens) {
  const auto octave =
      static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(num_tokens)));
  if (num_tokens <= 8 || num_tokens > kManyTokens) return octave;
  const std::int64_t step = num_tokens <= 64 ? 16 : num_tokens <= kFewTokens ? 32 : octave / 8;
  return (num_tokens + step - 1) / step * step;
}

bool CublasLt::run(const LtProduct& product, LtChoice choice, cudaStream_t stream) {
  Impl& lt = *impl_;
  Impl::Choice chosen = lt.choose(product, choice, stream);
  if (!chosen.algorithm) return false;
  const Problem problem(lt.api, product);
  if (chosen.num_tokens != product.num_tokens) {
    lt::HeuristicResult result{};
    const lt::Status status =
        lt.api.matmul_algo_check(lt.handle, problem.operation, problem.weight, problem.x, problem.y,
                                 problem.y, &*chosen.algorithm, &result);
    if (status != lt::kSuccess || result.workspace_bytes > kWorkspaceBytes) {
      chosen = lt.first_choice(product, product.num_tokens);
      if (!chosen.algorithm) return false;
    }
  }
  lt.api.check(lt.launch(problem, product, *chosen.algorithm, stream), "Matmul");
  return true;
}

void* CublasLt::workspace() const { return impl_->workspace; }
std::size_t CublasLt::workspace_bytes() const { return kWorkspaceBytes; }

std::string CublasLt::description() const {
  return "cuBLASLt " + std::to_string(impl_->api.get_version());
}

}  // namespace deltazip::cuda
