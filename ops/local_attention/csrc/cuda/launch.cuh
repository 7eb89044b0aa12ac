// Starts kernels, on the GPU or in the emulator, and asks the device what it can do.
#pragma once

#include <cstdio>

#include "primitives.cuh"

namespace local_attention {

// What went wrong, in a sentence; empty while all is well.
struct Failure {
  char text[240] = "";
  bool any() const { return text[0] != 0; }
};

struct Device {
  int64_t shared_per_block, shared_per_multiprocessor, multiprocessors;
};

constexpr int64_t MOST_BLOCKS = (int64_t{1} << 31) - 1;

#ifdef LOCAL_ATTENTION_EMULATED

inline Device device_limits() {
  return {static_cast<int64_t>(emulation::SHARED_LIMIT), 228 << 10, emulation::MULTIPROCESSORS};
}

template <typename... Parameters, typename... Arguments>
void launch(Failure& failure, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, Stream,
            const Arguments&... arguments) {
  if (failure.any() || blocks == 0) return;
  emulation::run_grid(blocks, threads, static_cast<size_t>(shared_bytes), [&] { kernel(arguments...); });
}

#else

inline Device device_limits() {
  int device = 0, block = 48 << 10, multiprocessor = 48 << 10, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return {block, multiprocessor, count};
}

template <typename... Parameters, typename... Arguments>
void launch(Failure& failure, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  if (failure.any() || blocks == 0) return;
  if (blocks > MOST_BLOCKS) {
    std::snprintf(failure.text, sizeof failure.text,
                  "local attention: %lld blocks are more than one launch can start; split the batch",
                  static_cast<long long>(blocks));
    return;
  }
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    // The ceiling belongs to the kernel, not to this launch: always the device's own, so that no other thread can
    // lower it between here and the launch.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device_limits().shared_per_block));
    // Several blocks are to share a multiprocessor. A hint: where it is refused, the error is forgotten.
    if (error == cudaSuccess && cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                     cudaSharedmemCarveoutMaxShared) != cudaSuccess)
      cudaGetLastError();
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream>>>(arguments...);
    error = cudaPeekAtLastError();
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  std::snprintf(failure.text, sizeof failure.text,
                "local attention: a CUDA kernel did not start, or one before it failed: %s", cudaGetErrorString(error));
}

#endif

}  // namespace local_attention
