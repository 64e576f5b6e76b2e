#pragma once

// The part of cuBLASLt's C interface that is used here, declared anew: its headers come only with a
// whole toolkit or a 400 MB wheel, while the library itself is opened at run time.

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace deltazip::cuda::lt {

struct HandleObject;
struct OperationObject;
struct LayoutObject;
struct PreferenceObject;
using Handle = HandleObject*;
using Operation = OperationObject*;
using Layout = LayoutObject*;
using Preference = PreferenceObject*;

using Status = int;  // C enumerations cross the border as int
inline constexpr Status kSuccess = 0;
inline constexpr int kTransposed = 1;                  // CUBLAS_OP_T
inline constexpr int kComputeFloat32 = 68;             // CUBLAS_COMPUTE_32F
inline constexpr int kTransposeA = 3;                  // CUBLASLT_MATMUL_DESC_TRANSA, int32
inline constexpr int kMaxWorkspaceBytes = 1;           // CUBLASLT_MATMUL_PREF_..., uint64
inline constexpr int kMinAlignments[] = {5, 6, 7, 8};  // of A, B, C and D in bytes, uint32

struct Algorithm {
  std::uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  std::size_t workspace_bytes;
  Status state;
  float num_waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96);

using Create = Status(Handle*);
using Destroy = Status(Handle);
using GetStatusString = const char*(Status);
using GetVersion = std::size_t();
using MatmulDescCreate = Status(Operation*, int compute_type, cudaDataType_t scale_type);
using MatmulDescDestroy = Status(Operation);
using MatmulDescSetAttribute = Status(Operation, int attribute, const void*, std::size_t);
using MatrixLayoutCreate = Status(Layout*, cudaDataType_t, std::uint64_t rows,
                                  std::uint64_t columns, std::int64_t leading_dimension);
using MatrixLayoutDestroy = Status(Layout);
using MatmulPreferenceCreate = Status(Preference*);
using MatmulPreferenceDestroy = Status(Preference);
using MatmulPreferenceSetAttribute = Status(Preference, int attribute, const void*, std::size_t);
using MatmulAlgoGetHeuristic = Status(Handle, Operation, Layout a, Layout b, Layout c, Layout d,
                                      Preference, int max_results, HeuristicResult*, int* count);
using MatmulAlgoCheck = Status(Handle, Operation, Layout a, Layout b, Layout c, Layout d,
                               const Algorithm*, HeuristicResult*);
using Matmul = Status(Handle, Operation, const void* alpha, const void* a, Layout, const void* b,
                      Layout, const void* beta, const void* c, Layout, void* d, Layout,
                      const Algorithm*, void* workspace, std::size_t workspace_bytes, cudaStream_t);

}  // namespace deltazip::cuda::lt
