// The two inner loops, both free of gathers: scores with queries in vector lanes, sums with channels in lanes.
#pragma once

#include "simd.h"

namespace local_attention {

// scores[r][c][x] = sum over d of q[r][d][x] * k[d][x + c * step], for R query rows and C window columns.
// A lane is a query: no key is multiplied that its query does not see. ADJACENT: step is 1; then C shifted vectors
// come out of two loaded ones, because loads across cache lines would be the limit.
template <class T, int R, int C, bool ADJACENT>
void score_tile(const T* q, ptrdiff_t q_row, const T* k, ptrdiff_t k_channel, ptrdiff_t step, int channels,
                T* const* scores, ptrdiff_t slot) {
  using S = Simd<T>;
  typename S::Vector sum[R][C] = {};
  for (int d = 0; d < channels; ++d) {
    typename S::Vector queries[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) queries[r] = S::load(q + r * q_row + d * S::LANES);
    const T* key = k + d * k_channel;
    const auto multiply = [&](auto c, typename S::Vector keys) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sum[r][c] += queries[r] * keys;
    };
    if constexpr (ADJACENT) {
      const typename S::Vector low = S::load(key), high = C > 1 ? S::load(key + S::LANES) : low;
      for_each_number<C>([&](auto c) { multiply(c, shifted<T, c>(low, high)); });
    } else {
      for_each_number<C>([&](auto c) { multiply(c, S::load(key + c * step)); });
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 9
    for (int c = 0; c < C; ++c) S::store(scores[r] + c * slot, sum[r][c]);
}

template <class T, int R>
void score_tile(int columns, const T* q, ptrdiff_t q_row, const T* k, ptrdiff_t k_channel, ptrdiff_t step,
                int channels, T* const* scores, ptrdiff_t slot) {
  static_assert(SCORE_COLUMNS == 9, "one case each");
#define LOCAL_ATTENTION_COLUMNS(C)                                                                     \
  case C:                                                                                              \
    return step == 1 && SHIFTS ? score_tile<T, R, C, SHIFTS>(q, q_row, k, k_channel, step, channels,   \
                                                             scores, slot)                             \
                               : score_tile<T, R, C, false>(q, q_row, k, k_channel, step, channels,    \
                                                            scores, slot);
  switch (columns) {
    LOCAL_ATTENTION_COLUMNS(1)
    LOCAL_ATTENTION_COLUMNS(2)
    LOCAL_ATTENTION_COLUMNS(3)
    LOCAL_ATTENTION_COLUMNS(4)
    LOCAL_ATTENTION_COLUMNS(5)
    LOCAL_ATTENTION_COLUMNS(6)
    LOCAL_ATTENTION_COLUMNS(7)
    LOCAL_ATTENTION_COLUMNS(8)
    LOCAL_ATTENTION_COLUMNS(9)
  }
#undef LOCAL_ATTENTION_COLUMNS
}

// scores[t][x] = sum over d of q[d][x] * k[t][d] for C tokens.
template <class T, int C>
void score_tokens(const T* q, const T* k, ptrdiff_t token, int channels, T* scores,
                  ptrdiff_t slot) {
  using S = Simd<T>;
  typename S::Vector sum[C] = {};
  for (int d = 0; d < channels; ++d) {
    const typename S::Vector queries = S::load(q + d * S::LANES);
#pragma GCC unroll 8
    for (int t = 0; t < C; ++t) sum[t] += queries * k[t * token + d];
  }
#pragma GCC unroll 8
  for (int t = 0; t < C; ++t) S::store(scores + t * slot, sum[t]);
}

// Where the operands of a weighted sum lie. Target i (of NI neighbours) takes source o with the weight at
// weights + row * weight_row + o * weight_source + i * weight_target.
template <class T>
struct Sum {
  T* target;
  ptrdiff_t target_stride;
  const T* source;
  ptrdiff_t source_row, source_stride;
  const T* weights;
  ptrdiff_t weight_row, weight_source, weight_target;
  int rows;
  int begin, end;  // sources
  int band;        // target i takes the sources i .. i + band - 1; 0: all
};

// target[i][:] += sum over rows and sources of weight * source[row][o][:], NV vectors of channels.
template <class T, int NI, int NV>
void weighted_sum(const Sum<T>& s) {
  using S = Simd<T>;
  typename S::Vector sum[NI][NV];
#pragma GCC unroll 4
  for (int i = 0; i < NI; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[i][n] = S::load(s.target + i * s.target_stride + n * S::LANES);
  const int full_begin = s.band ? NI - 1 : s.begin;
  const int full_end = s.band && s.band < s.end ? s.band : s.end;
  for (int row = 0; row < s.rows; ++row) {
    const T* weights = s.weights + row * s.weight_row;
    const T* source = s.source + row * s.source_row;
    int o = s.begin;
    const auto some = [&](int until) {
      for (; o < until; ++o) {
        const T* from = source + o * s.source_stride;
        const T* weight = weights + o * s.weight_source;
#pragma GCC unroll 4
        for (int i = 0; i < NI; ++i) {
          if (o < i || o - i >= s.band) continue;
          const T w = weight[i * s.weight_target];
#pragma GCC unroll 4
          for (int n = 0; n < NV; ++n) sum[i][n] += w * S::load(from + n * S::LANES);
        }
      }
    };
    some(full_begin < s.end ? full_begin : s.end);
    for (; o < full_end; ++o) {
      const T* from = source + o * s.source_stride;
      const T* weight = weights + o * s.weight_source;
      typename S::Vector values[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) {
        values[n] = S::load(from + n * S::LANES);
        pin(values[n]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < NI; ++i) {
        const T w = weight[i * s.weight_target];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) sum[i][n] += w * values[n];
      }
    }
    some(s.end);
  }
#pragma GCC unroll 4
  for (int i = 0; i < NI; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) S::store(s.target + i * s.target_stride + n * S::LANES, sum[i][n]);
}

constexpr int SUM_TARGETS = 4;

template <class T, int NI>
void weighted_sum_of(Sum<T> s, int channel_vectors) {
  for (int done = 0; done < channel_vectors;) {
    const int now = channel_vectors - done < CHANNEL_VECTORS ? channel_vectors - done : CHANNEL_VECTORS;
    switch (now) {
      case 1:
        weighted_sum<T, NI, 1>(s);
        break;
      case 2:
        weighted_sum<T, NI, 2>(s);
        break;
#if defined(__AVX512F__)
      case 3:
        weighted_sum<T, NI, 3>(s);
        break;
      case 4:
        weighted_sum<T, NI, 4>(s);
        break;
#endif
    }
    done += now;
    s.target += now * Simd<T>::LANES;
    s.source += now * Simd<T>::LANES;
  }
}

// The same for `targets` <= SUM_TARGETS neighbours and any number of channel vectors.
template <class T>
void weighted_sum(const Sum<T>& s, int targets, int channel_vectors) {
  if (s.rows <= 0 || s.begin >= s.end) return;
  switch (targets) {
    case 1:
      return weighted_sum_of<T, 1>(s, channel_vectors);
    case 2:
      return weighted_sum_of<T, 2>(s, channel_vectors);
    case 3:
      return weighted_sum_of<T, 3>(s, channel_vectors);
    case 4:
      return weighted_sum_of<T, 4>(s, channel_vectors);
  }
}

}  // namespace local_attention
