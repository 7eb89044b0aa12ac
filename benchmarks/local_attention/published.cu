// The algorithm of the published kernels, written anew for comparison: scores to memory, a softmax elsewhere, a
// weighted sum; scalar arithmetic, serial over channels or slots, one launch for every batch and head.
//
// Tensors are channel-first, [batch * heads, channels, rows, columns]; weights [batch * heads, rows, columns, slots].
// Compiles as CUDA, and as plain C++ (loops in place of launches) for the test of its arithmetic.
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif

struct Sizes {
  int64_t heads, channels, rows, columns, window_rows, window_columns, slots;  // heads: batch * heads
};

constexpr float OUTSIDE = -10000.0f;
constexpr int THREADS = 256;

// Whether slot `slot` of the window around `pixel` is inside the grid, and the pixel it means.
BOTH bool pixel_at(const Sizes& size, int64_t pixel, int64_t slot, int64_t* found) {
  int64_t row = pixel / size.columns + slot / size.window_columns - size.window_rows / 2;
  int64_t column = pixel % size.columns + slot % size.window_columns - size.window_columns / 2;
  *found = row * size.columns + column;
  return row >= 0 && row < size.rows && column >= 0 && column < size.columns;
}

template <class T>
BOTH void score(const Sizes& size, const T* query, const T* key, T* weights, int64_t index) {
  int64_t pixels = size.rows * size.columns, pixel = index / size.slots, other = 0;
  float sum = OUTSIDE;
  if (pixel_at(size, pixel, index % size.slots, &other)) {
    sum = 0.0f;
    for (int64_t channel = 0; channel < size.channels; ++channel)
      sum += static_cast<float>(query[channel * pixels + pixel]) * static_cast<float>(key[channel * pixels + other]);
  }
  weights[index] = static_cast<T>(sum);
}

template <class T>
BOTH void weigh(const Sizes& size, const T* weights, const T* value, T* out, int64_t index) {
  int64_t pixels = size.rows * size.columns, pixel = index % pixels, channel = index / pixels, other = 0;
  float sum = 0.0f;
  for (int64_t slot = 0; slot < size.slots; ++slot)
    if (pixel_at(size, pixel, slot, &other))
      sum += static_cast<float>(weights[pixel * size.slots + slot]) * static_cast<float>(value[channel * pixels + other]);
  out[index] = static_cast<T>(sum);
}

#ifdef __CUDACC__
template <class T>
__global__ void scores(Sizes size, const T* query, const T* key, T* weights, int64_t count) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index < count) score(size, query, key, weights, index);
}

template <class T>
__global__ void sums(Sizes size, const T* weights, const T* value, T* out, int64_t count) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (index < count) weigh(size, weights, value, out, index);
}
#define EACH(kernel, function, count, ...) \
  kernel<T><<<static_cast<unsigned>((count + THREADS - 1) / THREADS), THREADS, 0, static_cast<cudaStream_t>(stream)>>>( \
      size, __VA_ARGS__, count)
#else
#define EACH(kernel, function, count, ...) \
  for (int64_t index = 0; index < count; ++index) function<T>(size, __VA_ARGS__, index)
#endif

template <class T>
int run(const Sizes& size, bool is_score, const void* first, const void* second, void* result, void* stream) {
  int64_t pixels = size.rows * size.columns, grid = size.channels * pixels, window = pixels * size.slots;
  (void)stream;
  for (int64_t head = 0; head < size.heads; ++head) {
    if (is_score) {
      EACH(scores, score, window, static_cast<const T*>(first) + head * grid,
           static_cast<const T*>(second) + head * grid, static_cast<T*>(result) + head * window);
    } else {
      EACH(sums, weigh, grid, static_cast<const T*>(first) + head * window,
           static_cast<const T*>(second) + head * grid, static_cast<T*>(result) + head * grid);
    }
  }
#ifdef __CUDACC__
  return static_cast<int>(cudaGetLastError());
#else
  return 0;
#endif
}

// type: 0 float, 1 bfloat16, 2 half. Returns 0, or the number of a CUDA error.
extern "C" int published(const Sizes* size, int type, int is_score, const void* first, const void* second,
                         void* result, void* stream) {
#ifdef __CUDACC__
  if (type == 1) return run<__nv_bfloat16>(*size, is_score, first, second, result, stream);
  if (type == 2) return run<__half>(*size, is_score, first, second, result, stream);
#endif
  return type == 0 ? run<float>(*size, is_score, first, second, result, stream) : -1;
}
