// Which problems the tensor-core kernels take, with which tiles, and their launches.
#pragma once

#include "tensor_core_backward.cuh"
#include "tensor_core_forward.cuh"

namespace local_attention {
namespace tensor_core {

constexpr int MOST_WINDOW = 128, MOST_GRID = 1 << 15, MOST_TOKENS = 256;
constexpr int64_t RESERVED_SHARED = 1024;  // the system's part of every block

inline bool aligned(const View& view, int64_t rows, int64_t columns, const Problem& p) {
  if (!view.data) return true;
  const auto even = [](int64_t stride, int64_t size) { return size <= 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && even(view.batch, p.batch) && even(view.row, rows) &&
         even(view.column, columns) && even(view.head, p.heads);
}

inline bool small(const Window& w) {
  return window_rows(w) <= MOST_WINDOW && window_columns(w) <= MOST_WINDOW && w.top >= 0 && w.bottom >= 0 &&
         w.left >= 0 && w.right >= 0;
}

// Whether types, sizes and addresses suit; shared memory may still not suffice.
inline bool suits(const Problem& p) {
  if (p.data_type != BFLOAT16 && p.data_type != FLOAT16) return false;
  if (p.channels != 32 && p.channels != 64 && p.channels != 128) return false;
  if (p.rows < 1 || p.columns < 1 || p.rows > MOST_GRID || p.columns > MOST_GRID) return false;
  if (p.tokens > MOST_TOKENS) return false;
  if (!(p.scale > 1e-30 || p.scale < -1e-30)) return false;
  if (p.key.data && !small(p.window)) return false;
  if (p.cross_key.data && (!small(p.cross_window) || p.cross_window.causal)) return false;
  const View* fine[] = {&p.query, &p.key, &p.value, &p.out, &p.grad_out, &p.grad_query, &p.grad_key, &p.grad_value};
  const View* coarse[] = {&p.cross_key, &p.cross_value, &p.grad_cross_key, &p.grad_cross_value};
  const View* tokens[] = {&p.token_key, &p.token_value, &p.grad_token_key, &p.grad_token_value};
  for (const View* view : fine)
    if (!aligned(*view, p.rows, p.columns, p)) return false;
  for (const View* view : coarse)
    if (!aligned(*view, p.cross_rows, p.cross_columns, p)) return false;
  for (const View* view : tokens)
    if (!aligned(*view, 1, p.tokens, p)) return false;
  return true;
}

inline bool drops(const Problem& p) { return p.dropout > 0 && p.seed; }

inline tile::StripShape query_shape(const Problem& p) {
  tile::StripShape shape = {};
  shape.channels = static_cast<int>(p.channels);
  shape.rows = static_cast<int>(p.rows);
  shape.columns = static_cast<int>(p.columns);
  shape.local = p.key.data != nullptr;
  shape.window = p.window;
  shape.cross = p.cross_key.data != nullptr;
  shape.cross_rows = static_cast<int>(p.cross_rows);
  shape.cross_columns = static_cast<int>(p.cross_columns);
  shape.cross_window = p.cross_window;
  shape.tokens = p.token_key.data ? static_cast<int>(p.tokens) : 0;
  return shape;
}

#ifdef LOCAL_ATTENTION_EMULATED
// Tests ask for plans that the chooser would pass over: warps * 2 + ahead, or 0.
inline int& wanted_plan() {
  static int wanted = 0;
  return wanted;
}
inline bool passed_over(int warps, int ahead, int most_warps) {
  const int wanted = wanted_plan();
  return wanted && ((wanted / 2 != warps && most_warps > 4) || wanted % 2 != ahead);
}
#else
inline bool passed_over(int, int, int) { return false; }
#endif

// Chooses rows per step and whether to fetch ahead: what keeps the most warps on a multiprocessor. A block alone
// there that does not fetch ahead waits for memory with nothing else to do. `plan.bytes` is 0 if nothing fits.
inline StripPlan choose_strip(const tile::StripShape& shape, const Device& device, int64_t planes,
                              int64_t threads_per_multiprocessor, int most_warps) {
  StripPlan best = {};
  int64_t best_score = 0, best_resident = 0;
  for (int warps = most_warps; warps >= 4; warps -= 4)
    for (int ahead = 0; ahead < 2; ++ahead) {
      if (passed_over(warps, ahead, most_warps)) continue;
      const StripPlan plan = tile::plan_strip(shape, warps, ahead);
      if (plan.bytes > device.shared_per_block || plan.ring_rows * plan.ring_columns >= 1 << 16) continue;
      const int64_t resident = lowest(
          static_cast<int>(device.shared_per_multiprocessor / (plan.bytes + RESERVED_SHARED)),
          static_cast<int>(threads_per_multiprocessor / (32 * warps)));
      const int64_t score = highest(static_cast<int>(resident), 1) * warps * (resident > 1 || ahead ? 10 : 6);
      if (score <= best_score) continue;
      best = plan;
      best_score = score;
      best_resident = highest(static_cast<int>(resident), 1);
    }
  if (best.bytes) tile::cut_bands(best, shape.rows, planes, best_resident * device.multiprocessors);
  return best;
}

inline StripPlan plan_forward(const Problem& p, const Device& device) {
  const int64_t threads = p.channels == 128 || drops(p) ? 256 : 512;  // that the registers allow, see STRIP_BLOCKS
  return choose_strip(query_shape(p), device, p.batch * p.heads, threads, 8);
}

struct BackwardPlan {
  StripPlan query, key;
  bool fits;
};

inline BackwardPlan plan_backward(const Problem& p, const Device& device) {
  BackwardPlan plan = {};
  plan.query = plan_forward(p, device);
  plan.fits = plan.query.bytes > 0;
  if (!p.key.data || !plan.fits) return plan;
  tile::StripShape shape = query_shape(p);
  shape.window = mirrored(p.window);
  shape.cross = false;
  shape.tokens = 0;
  shape.statistics = true;
  const int64_t threads = drops(p) || p.channels == 128 ? 2 * KEY_THREADS : 3 * KEY_THREADS;
  plan.key = choose_strip(shape, device, p.batch * p.heads, threads, KEY_THREADS / 32);
  plan.fits = plan.key.bytes > 0;
  return plan;
}

inline const char* name_of(const Problem& p, const StripPlan& plan) {
  const bool eight = plan.step == 8;
  switch (p.channels) {
    case 32: return eight ? "tensor_core_d32_8x16" : "tensor_core_d32_4x16";
    case 64: return eight ? "tensor_core_d64_8x16" : "tensor_core_d64_4x16";
    default: return eight ? "tensor_core_d128_8x16" : "tensor_core_d128_4x16";
  }
}

inline int64_t blocks_of(const Problem& p, const StripPlan& plan) {
  return p.batch * p.heads * plan.strips * plan.bands;
}

inline Scale scale_of(const Problem& p) {
  return {static_cast<float>(p.scale < 0 ? -p.scale : p.scale) * LOG2_E, p.scale < 0 ? 0x80008000u : 0u};
}

template <typename T, int D>
void launch_forward(Failure& failure, const Problem& p, const StripPlan& plan, Stream stream) {
  launch(failure, drops(p) ? strip_forward<T, D, QueryDropout> : strip_forward<T, D, NoDropout>, blocks_of(p, plan),
         32 * plan.warps, plan.bytes, stream, p, plan, scale_of(p));
}

template <typename T>
void run_forward(Failure& failure, const Problem& p, const StripPlan& plan, Stream stream) {
  switch (p.channels) {
    case 32: return launch_forward<T, 32>(failure, p, plan, stream);
    case 64: return launch_forward<T, 64>(failure, p, plan, stream);
    default: return launch_forward<T, 128>(failure, p, plan, stream);
  }
}

inline int64_t token_patches(const Problem& p) { return p.token_key.data ? (p.tokens + GROUP - 1) / GROUP : 0; }
inline int64_t coarse_patch_columns(const Problem& p) { return (p.cross_columns + PATCH - 1) / PATCH; }
inline int64_t coarse_patches(const Problem& p) {
  return p.cross_key.data ? (p.cross_rows + PATCH - 1) / PATCH * coarse_patch_columns(p) : 0;
}

inline int64_t workspace_bytes(const Problem& p) {
  return p.batch * p.heads * (8 * p.rows * p.columns + 4 * p.tokens + 4 * coarse_patches(p));
}

template <typename T, int D>
void launch_backward(Failure& failure, const Problem& p, const BackwardPlan& plan, Stream stream) {
  const int64_t planes = p.batch * p.heads;
  const Scale scale = scale_of(p);
  Statistics* statistics = static_cast<Statistics*>(p.workspace);
  float* token_parts = reinterpret_cast<float*>(statistics + planes * p.rows * p.columns);
  float* cross_parts = token_parts + planes * p.tokens;
  launch(failure, drops(p) ? strip_query_gradient<T, D, QueryDropout> : strip_query_gradient<T, D, NoDropout>,
         blocks_of(p, plan.query), 32 * plan.query.warps, plan.query.bytes, stream, p, plan.query, scale, statistics);
  if (p.key.data && (p.grad_key.data || p.grad_value.data))
    launch(failure, drops(p) ? strip_key_gradient<T, D, true> : strip_key_gradient<T, D, false>,
           blocks_of(p, plan.key), 32 * plan.key.warps, plan.key.bytes, stream, p, plan.key, scale, statistics);
  if (p.cross_key.data && (p.grad_cross_key.data || p.grad_cross_value.data || p.grad_cross_bias))
    launch(failure, stream_key_gradient<T, D, false>, planes * coarse_patches(p), 32 * STREAM_WARPS, STREAM_BYTES<D>,
           stream, p,
           StreamPlan{static_cast<int>(coarse_patches(p)), static_cast<int>(coarse_patch_columns(p)),
                      static_cast<int>(p.rows / p.cross_rows), static_cast<int>(p.columns / p.cross_columns),
                      static_cast<uint32_t>(window_rows(p.cross_window)),
                      static_cast<uint32_t>(window_columns(p.cross_window))},
           scale, statistics, p.grad_cross_bias ? cross_parts : static_cast<float*>(nullptr));
  if (p.grad_token_key.data || p.grad_token_value.data || p.grad_token_bias)
    launch(failure, stream_key_gradient<T, D, true>, planes * token_patches(p), 32 * STREAM_WARPS, STREAM_BYTES<D>,
           stream, p, StreamPlan{static_cast<int>(token_patches(p)), 1, 1, 1, 0, 0}, scale, statistics,
           p.grad_token_bias ? token_parts : static_cast<float*>(nullptr));
  if (token_patches(p) && p.grad_token_bias) plain::reduce_token_bias(failure, p, token_parts, stream);
  if (p.grad_cross_bias)
    plain::reduce_cross_bias(failure, p, cross_parts, planes * coarse_patches(p), stream);
}

template <typename T>
void run_backward(Failure& failure, const Problem& p, const BackwardPlan& plan, Stream stream) {
  switch (p.channels) {
    case 32: return launch_backward<T, 32>(failure, p, plan, stream);
    case 64: return launch_backward<T, 64>(failure, p, plan, stream);
    default: return launch_backward<T, 128>(failure, p, plan, stream);
  }
}

}  // namespace tensor_core
}  // namespace local_attention
