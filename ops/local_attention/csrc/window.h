// Which keys a query sees, and which weights dropout drops: the arithmetic that CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOCAL_ATTENTION_BOTH __host__ __device__ __forceinline__
#else
#define LOCAL_ATTENTION_BOTH inline
#endif

namespace local_attention {

// A query whose centre is cell (y, x) of the key grid sees (y + u, x + v) with -top <= u <= bottom and
// -left <= v <= right, where that lies inside the grid. Slots are numbered in raster order from (-top, -left).
struct Window {
  int32_t top, bottom, left, right;
  int32_t causal;  // only slots up to the centre, in raster order (the caller sets bottom = 0)
};

LOCAL_ATTENTION_BOTH int window_rows(const Window& w) { return w.top + w.bottom + 1; }
LOCAL_ATTENTION_BOTH int window_columns(const Window& w) { return w.left + w.right + 1; }

// The last column offset that is seen in the row at offset u.
LOCAL_ATTENTION_BOTH int last_column(const Window& w, int u) { return w.causal && u == 0 ? 0 : w.right; }

LOCAL_ATTENTION_BOTH bool sees(const Window& w, int u, int v) {
  return u >= -w.top && u <= w.bottom && v >= -w.left && v <= last_column(w, u);
}

// Slots of the whole rectangle; slots behind a causal centre are never used.
LOCAL_ATTENTION_BOTH int window_slots(const Window& w) { return window_rows(w) * window_columns(w); }

LOCAL_ATTENTION_BOTH int window_slot(const Window& w, int u, int v) {
  return (u + w.top) * window_columns(w) + v + w.left;
}

// The queries that see a key of the same grid, as offsets from the key: query = key - (u, v).
// A causal window's mirror image sees its own row from the centre on; `causal` cannot say that, so callers that
// walk a mirrored window still ask sees(w, key - query).
LOCAL_ATTENTION_BOTH Window mirrored(const Window& w) { return {w.bottom, w.top, w.right, w.left, 0}; }

LOCAL_ATTENTION_BOTH int floor_divide(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
LOCAL_ATTENTION_BOTH int lowest(int a, int b) { return a < b ? a : b; }
LOCAL_ATTENTION_BOTH int highest(int a, int b) { return a > b ? a : b; }

// Dropout. A weight's fate depends on the seed, the (batch, head), the query and the slot only, so every kernel
// drops the same weights and the backward pass finds them again. Slots are numbered [tokens; cross; local].
//
// The mixer is the finaliser of MurmurHash3: every input bit flips every output bit with about even odds.
LOCAL_ATTENTION_BOTH uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return x;
}

LOCAL_ATTENTION_BOTH uint32_t dropout_stream(int64_t seed, int64_t batch_and_head) {
  uint64_t head = static_cast<uint64_t>(batch_and_head);
  uint32_t x = mix_bits(static_cast<uint32_t>(seed) + 0x9e3779b9u);
  x = mix_bits(x ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  x = mix_bits(x ^ static_cast<uint32_t>(head));
  return mix_bits(x ^ static_cast<uint32_t>(head >> 32) ^ 0x5bd1e995u);
}

LOCAL_ATTENTION_BOTH uint32_t dropout_query(uint32_t stream, int query) {
  return mix_bits(stream ^ (static_cast<uint32_t>(query) * 0x9e3779b1u));
}

LOCAL_ATTENTION_BOTH uint32_t dropout_bits(uint32_t query_bits, int slot) {
  return mix_bits(query_bits ^ (static_cast<uint32_t>(slot) * 0x85ebca77u));
}

// Weights whose bits are below this are dropped.
LOCAL_ATTENTION_BOTH uint32_t dropout_threshold(double probability) {
  double scaled = probability * 4294967296.0;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

}  // namespace local_attention
