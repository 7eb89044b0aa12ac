// The few things that a GPU has and C++ has not. Kernels use nothing else of CUDA, so they also run on the CPU,
// through the emulator, when LOCAL_ATTENTION_EMULATED is defined.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../window.h"

#ifdef LOCAL_ATTENTION_EMULATED
#include "../emulation/emulator.h"
#define LOCAL_ATTENTION_DEVICE inline
#define LOCAL_ATTENTION_KERNEL(threads, blocks_per_multiprocessor) void
#define LOCAL_ATTENTION_UNROLL
#define LOCAL_ATTENTION_NO_UNROLL
#else
#include <cuda_runtime.h>
#define LOCAL_ATTENTION_DEVICE __device__ __forceinline__
#define LOCAL_ATTENTION_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define LOCAL_ATTENTION_UNROLL _Pragma("unroll")
#define LOCAL_ATTENTION_NO_UNROLL _Pragma("unroll 1")
#endif

namespace local_attention {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

#ifdef LOCAL_ATTENTION_EMULATED

using Stream = void*;

inline int thread_index() { return emulation::machine().thread; }
inline int thread_index_anew() { return thread_index(); }
inline int block_threads() { return emulation::machine().threads; }
inline int64_t block_index() { return emulation::machine().block; }
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulation::machine().shared); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulation::machine().shared) + emulation::SHARED_START;
}
inline void block_barrier() { emulation::block_barrier(); }
inline void warp_barrier() { emulation::warp_barrier(); }
template <typename V>
V shuffle(V value, int lane) {
  return emulation::shuffle(value, lane);
}
template <typename V>
V shuffle_xor(V value, int mask) {
  return emulation::shuffle(value, (thread_index() % 32) ^ mask);
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float bits_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_wide(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, rest = x.bits & 1023;
  if (exponent == 31) return bits_as_float(sign | 0x7f800000 | rest << 13);
  if (exponent == 0) return (sign ? -5.9604644775390625e-8f : 5.9604644775390625e-8f) * static_cast<float>(rest);
  return bits_as_float(sign | (exponent + 112) << 23 | rest << 13);
}
inline uint16_t round_to_bfloat16(float x) {
  uint32_t bits = float_as_bits(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to_float16(float x) {
  const uint32_t bits = float_as_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000)                         // subnormal: steps of 2^-24, rounded by the addition
    return sign | static_cast<uint16_t>(float_as_bits(bits_as_float(magnitude) + 0.5f) - 0x3f000000);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
template <typename T>
uint16_t round_to(float x);
template <>
inline uint16_t round_to<Bfloat16>(float x) { return round_to_bfloat16(x); }
template <>
inline uint16_t round_to<Float16>(float x) { return round_to_float16(x); }

template <typename T>
uint32_t pack(float low, float high) {
  return round_to<T>(low) | static_cast<uint32_t>(round_to<T>(high)) << 16;
}

inline void load_matrices(uint32_t (&result)[4], uint32_t address) { emulation::load_matrices(result, address, false); }
inline void load_matrices_transposed(uint32_t (&result)[4], uint32_t address) {
  emulation::load_matrices(result, address, true);
}
template <typename T>
void matrix_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::matrix_product(c, a, b0, b1, [](uint16_t bits) { return to_wide(T{bits}); });
}
inline void copy_async(uint32_t target, const void* source, bool valid) {
  emulation::copy_async(target, source, 16, valid);
}
inline void copy_async_8(uint32_t target, const void* source, bool valid) {
  emulation::copy_async(target, source, 8, valid);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int PENDING>
void copy_wait() {
  emulation::copy_wait(PENDING);
}

#else  // a GPU

using Stream = cudaStream_t;

LOCAL_ATTENTION_DEVICE int thread_index() { return threadIdx.x; }
LOCAL_ATTENTION_DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
LOCAL_ATTENTION_DEVICE int block_threads() { return blockDim.x; }
LOCAL_ATTENTION_DEVICE int64_t block_index() { return blockIdx.x; }
LOCAL_ATTENTION_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}
LOCAL_ATTENTION_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
LOCAL_ATTENTION_DEVICE void block_barrier() { __syncthreads(); }
LOCAL_ATTENTION_DEVICE void warp_barrier() { __syncwarp(); }
template <typename V>
LOCAL_ATTENTION_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename V>
LOCAL_ATTENTION_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// One instruction, about 2 ulp; results below the smallest normal number are 0.
LOCAL_ATTENTION_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
LOCAL_ATTENTION_DEVICE float log2_fast(float x) { return log2f(x); }
LOCAL_ATTENTION_DEVICE float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
LOCAL_ATTENTION_DEVICE uint32_t float_as_bits(float value) { return __float_as_uint(value); }

LOCAL_ATTENTION_DEVICE float to_wide(Float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
template <typename T>
LOCAL_ATTENTION_DEVICE uint16_t round_to(float x);
template <>
LOCAL_ATTENTION_DEVICE uint16_t round_to<Bfloat16>(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
template <>
LOCAL_ATTENTION_DEVICE uint16_t round_to<Float16>(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
template <typename T>
LOCAL_ATTENTION_DEVICE uint32_t pack(float low, float high);
template <>
LOCAL_ATTENTION_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
template <>
LOCAL_ATTENTION_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

LOCAL_ATTENTION_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
LOCAL_ATTENTION_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// C += A B: A is 16 x 16, B 16 x 8, C 16 x 8. Volatile: the whole warp must take part, so no branch may swallow it.
template <typename T>
LOCAL_ATTENTION_DEVICE void matrix_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
LOCAL_ATTENTION_DEVICE void matrix_product<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
LOCAL_ATTENTION_DEVICE void matrix_product<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes to shared memory, past the registers; zeros where not `valid`, and then nothing is read.
LOCAL_ATTENTION_DEVICE void copy_async(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(target), "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
LOCAL_ATTENTION_DEVICE void copy_async_8(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(target), "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}
LOCAL_ATTENTION_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
LOCAL_ATTENTION_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

LOCAL_ATTENTION_DEVICE int lane_index() { return static_cast<unsigned>(thread_index()) % 32; }
LOCAL_ATTENTION_DEVICE int warp_index() { return static_cast<unsigned>(thread_index()) / 32; }
// The same, but the compiler may not reuse what it computed from it before: for values that are cheaper to compute
// again than to keep in registers through a loop.
LOCAL_ATTENTION_DEVICE int lane_index_anew() { return static_cast<unsigned>(thread_index_anew()) % 32; }
LOCAL_ATTENTION_DEVICE int warp_index_anew() { return static_cast<unsigned>(thread_index_anew()) / 32; }

LOCAL_ATTENTION_DEVICE float to_wide(Bfloat16 x) { return bits_as_float(static_cast<uint32_t>(x.bits) << 16); }
LOCAL_ATTENTION_DEVICE float to_wide(float x) { return x; }
LOCAL_ATTENTION_DEVICE double to_wide(double x) { return x; }

template <typename T>
LOCAL_ATTENTION_DEVICE void store(T* target, float x) {
  target->bits = round_to<T>(x);
}
template <>
LOCAL_ATTENTION_DEVICE void store<float>(float* target, float x) {
  *target = x;
}
LOCAL_ATTENTION_DEVICE void store(double* target, double x) { *target = x; }

template <typename T>
LOCAL_ATTENTION_DEVICE float low_half(uint32_t pair) {
  return to_wide(T{static_cast<uint16_t>(pair)});
}
template <typename T>
LOCAL_ATTENTION_DEVICE float high_half(uint32_t pair) {
  return to_wide(T{static_cast<uint16_t>(pair >> 16)});
}

LOCAL_ATTENTION_DEVICE float minus_infinity() { return bits_as_float(0xff800000u); }

// All lanes get the sum (largest) of all lanes; the order is fixed.
template <typename V>
LOCAL_ATTENTION_DEVICE V warp_sum(V value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <typename V>
LOCAL_ATTENTION_DEVICE V warp_largest(V value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const V other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace local_attention
