// Vectors of the compiler's vector extension: one source for AVX-512, AVX2 and anything without them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace local_attention {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;  // 32 registers of this size: two query rows share every key vector
constexpr int SCORE_ROWS = 2;
constexpr int CHANNEL_VECTORS = 4;
#else
constexpr int VECTOR_BYTES = 32;  // 16 registers
constexpr int SCORE_ROWS = 1;
constexpr int CHANNEL_VECTORS = 2;
#endif

// Window columns whose scores are kept in registers at once.
constexpr int SCORE_COLUMNS = 9;

template <class T>
struct Simd {
  static constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef Integer Integers __attribute__((vector_size(VECTOR_BYTES)));

  static Vector load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(T* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static Vector fill(T x) { return x - Vector{}; }
  static Integers lane_numbers() {
    Integers n;
    for (int i = 0; i < LANES; ++i) n[i] = i;
    return n;
  }
};

// Keep a value in its register: the compiler would rather load it again for every use, and loads are the limit.
template <class V>
inline void pin(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX__)
  asm("" : "+x"(value));
#else
  (void)value;
#endif
}

// Call f with the compile-time numbers 0 .. N - 1.
template <int N, class F, int... I>
inline void for_each_number(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
inline void for_each_number(F f) {
  for_each_number<N>(f, std::make_integer_sequence<int, N>{});
}

// Whether `shifted` is cheap here.
#if defined(__AVX512F__)
constexpr bool SHIFTS = true;
#else
constexpr bool SHIFTS = false;
#endif

// Lanes n .. n + LANES - 1 of the two vectors side by side.
template <class T, int N>
inline typename Simd<T>::Vector shifted(typename Simd<T>::Vector low, typename Simd<T>::Vector high) {
  using S = Simd<T>;
  static_assert(N >= 0 && N <= S::LANES);
  if constexpr (N == 0) return low;
  if constexpr (N == S::LANES) return high;
#if defined(__AVX512F__)
  if constexpr (N > 0 && N < S::LANES) {
    const __m512i a = reinterpret_cast<__m512i>(low), b = reinterpret_cast<__m512i>(high);
    if constexpr (sizeof(T) == 4)
      return reinterpret_cast<typename S::Vector>(_mm512_alignr_epi32(b, a, N));
    else
      return reinterpret_cast<typename S::Vector>(_mm512_alignr_epi64(b, a, N));
  }
#endif
  return low;
}

// exp of every lane, for arguments up to about 80; 0 below the normal range, NaN stays NaN.
inline Simd<float>::Vector exponential(Simd<float>::Vector x) {
  using V = Simd<float>::Vector;
  using I = Simd<float>::Integers;
  // x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds n to an integer in the low mantissa bits.
  const V magic = Simd<float>::fill(12582912.0f);
  V shifted = x * 1.44269504088896341f + magic;
  V n = shifted - magic;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // The polynomial of the Cephes library, relative error about 1e-7.
  V p = Simd<float>::fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n as a number of its own: added to the exponent of p, it would turn a NaN with payload into something finite.
  I power = (reinterpret_cast<I>(shifted) << 23) + 0x3f800000;
  return x < -87.0f ? V{} : p * reinterpret_cast<V>(power);
}

inline Simd<double>::Vector exponential(Simd<double>::Vector x) {
  for (int i = 0; i < Simd<double>::LANES; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Swap rows and columns of a square of LANES vectors by a butterfly.
template <class T>
inline void transpose(typename Simd<T>::Vector* rows) {
  using S = Simd<T>;
  const typename S::Integers lane = S::lane_numbers();
#pragma GCC unroll 4
  for (int width = 1; width < S::LANES; width *= 2) {
    const typename S::Integers high = (lane & width) != 0;
    // Indices from LANES on take lanes of the second vector.
    const typename S::Integers first = high ? (lane ^ width) + S::LANES : lane;
    const typename S::Integers second = high ? lane + S::LANES : (lane | width);
#pragma GCC unroll 16
    for (int i = 0; i < S::LANES; ++i) {
      if (i & width) continue;
      const typename S::Vector a = rows[i], b = rows[i | width];
      rows[i] = __builtin_shuffle(a, b, first);
      rows[i | width] = __builtin_shuffle(a, b, second);
    }
  }
}

// Storage types. Arithmetic is in float (double for double).
struct BFloat16 {
  uint16_t bits;
};
#ifdef __FLT16_MAX__
using Float16 = _Float16;
#endif

inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
#ifdef __FLT16_MAX__
inline float widen(Float16 x) { return static_cast<float>(x); }
inline void narrow(float x, Float16& to) { to = static_cast<Float16>(x); }
#endif
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Round to nearest even; a NaN keeps its sign and stays quiet.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace local_attention
