// Kernels for every type, any window and up to 256 channels: simple and exact, not fast. They serve float32 and
// float64, and whatever the tensor-core kernels decline.
//
// One warp works on one query (forward, query gradient) or on one key (key and value gradients). It takes 32
// partners at a time: first every lane scores one partner, then the lanes take a channel each and sum.
#pragma once

#include "../problem.h"
#include "launch.cuh"

namespace local_attention {
namespace plain {

constexpr int WARPS = 4;
constexpr int MOST_CHANNELS = 256;
constexpr int SLICES = MOST_CHANNELS / 32;  // channels of one lane: lane, lane + 32, ...

enum Part { TOKENS, CROSS, LOCAL };  // in the order of the softmax

LOCAL_ATTENTION_DEVICE float exponential(float x) { return expf(x); }
LOCAL_ATTENTION_DEVICE double exponential(double x) { return exp(x); }
LOCAL_ATTENTION_DEVICE float logarithm(float x) { return logf(x); }
LOCAL_ATTENTION_DEVICE double logarithm(double x) { return log(x); }

// A tensor as one (batch, head) sees it.
template <typename T>
struct Plane {
  T* data;
  int64_t row, column;

  LOCAL_ATTENTION_DEVICE Plane(const View& view, int batch, int head)
      : data(static_cast<T*>(view.data)), row(view.row), column(view.column) {
    if (data) data += batch * view.batch + head * view.head;
  }
  LOCAL_ATTENTION_DEVICE T* at(int y, int x) const { return data + y * row + x * column; }
};

// Cells (top + i, left + j) of a grid.
struct Rectangle {
  int top, left, rows, columns;
  LOCAL_ATTENTION_DEVICE int count() const { return rows * columns; }
};

LOCAL_ATTENTION_DEVICE Rectangle clip(int top, int bottom, int left, int right, int rows, int columns) {
  top = highest(top, 0);
  left = highest(left, 0);
  return {top, left, highest(lowest(bottom + 1, rows) - top, 0), highest(lowest(right + 1, columns) - left, 0)};
}

// One (batch, head) of a problem, and what its keys of one kind look like.
template <typename T, Part PART>
struct Keys {
  const Problem& problem;
  Plane<T> key, value;
  int rows, columns, row_ratio, column_ratio, first_slot;
  Window window;
  const Wide<T>* token_bias;
  Wide<T> cross_bias;

  LOCAL_ATTENTION_DEVICE Keys(const Problem& p, int batch, int head)
      : problem(p),
        key(PART == TOKENS ? p.token_key : PART == CROSS ? p.cross_key : p.key, batch, head),
        value(PART == TOKENS ? p.token_value : PART == CROSS ? p.cross_value : p.value, batch, head),
        rows(PART == TOKENS ? 1 : static_cast<int>(PART == CROSS ? p.cross_rows : p.rows)),
        columns(static_cast<int>(PART == TOKENS ? p.tokens : PART == CROSS ? p.cross_columns : p.columns)),
        row_ratio(1),
        column_ratio(1),
        first_slot(0),
        window(PART == CROSS ? p.cross_window : p.window),
        token_bias(nullptr),
        cross_bias(0) {
    if (PART == TOKENS) {
      key.row = value.row = 0;
      if (p.token_bias) token_bias = static_cast<const Wide<T>*>(p.token_bias) + batch * p.tokens;
      return;
    }
    first_slot = static_cast<int>(p.tokens);
    if (PART == CROSS) {
      row_ratio = static_cast<int>(p.rows / p.cross_rows);
      column_ratio = static_cast<int>(p.columns / p.cross_columns);
      if (p.cross_bias) cross_bias = *static_cast<const Wide<T>*>(p.cross_bias);
    } else if (p.cross_key.data) {
      first_slot += window_slots(p.cross_window);
    }
  }

  // Where the keys that a query may see lie; some of them may still be hidden.
  LOCAL_ATTENTION_DEVICE Rectangle reach(int y, int x) const {
    if (PART == TOKENS) return {0, 0, 1, columns};
    y /= row_ratio;
    x /= column_ratio;
    return clip(y - window.top, y + window.bottom, x - window.left, x + window.right, rows, columns);
  }

  // Where the queries that may see a key lie.
  LOCAL_ATTENTION_DEVICE Rectangle seen_by(int y, int x) const {
    const int query_rows = static_cast<int>(problem.rows), query_columns = static_cast<int>(problem.columns);
    if (PART == TOKENS) return {0, 0, query_rows, query_columns};
    const Window back = mirrored(window);
    return clip((y - back.top) * row_ratio, (y + back.bottom) * row_ratio + row_ratio - 1,
                (x - back.left) * column_ratio, (x + back.right) * column_ratio + column_ratio - 1, query_rows,
                query_columns);
  }

  LOCAL_ATTENTION_DEVICE bool visible(int y, int x, int key_y, int key_x) const {
    return PART == TOKENS || sees(window, key_y - y / row_ratio, key_x - x / column_ratio);
  }
  LOCAL_ATTENTION_DEVICE int slot(int y, int x, int key_y, int key_x) const {
    return PART == TOKENS ? key_x : first_slot + window_slot(window, key_y - y / row_ratio, key_x - x / column_ratio);
  }
  LOCAL_ATTENTION_DEVICE Wide<T> bias(int key_x) const {
    if (PART == TOKENS) return token_bias ? token_bias[key_x] : Wide<T>(0);
    return cross_bias;
  }
};

template <Part PART>
LOCAL_ATTENTION_BOTH bool present(const Problem& p) {
  if (PART == TOKENS) return p.token_key.data && p.tokens > 0;
  return PART == CROSS ? p.cross_key.data != nullptr : p.key.data != nullptr;
}

template <typename T>
LOCAL_ATTENTION_DEVICE Wide<T> dot(const T* a, const T* b, int channels) {
  Wide<T> sum = 0;
  for (int c = 0; c < channels; ++c) sum += to_wide(a[c]) * to_wide(b[c]);
  return sum;
}

// Which weights dropout keeps, and their factor.
struct Dropout {
  uint32_t threshold, stream;
  double factor;

  LOCAL_ATTENTION_DEVICE Dropout(const Problem& p, int batch, int head) : threshold(0), stream(0), factor(1) {
    if (!(p.dropout > 0) || !p.seed) return;
    threshold = dropout_threshold(p.dropout);
    stream = dropout_stream(*p.seed, batch * p.heads + head);
    factor = 1 / (1 - p.dropout);
  }
  // The factor of a weight: 0 where it is dropped.
  template <typename V>
  LOCAL_ATTENTION_DEVICE V of(int query, int slot) const {
    if (!threshold) return V(1);
    return dropout_bits(dropout_query(stream, query), slot) < threshold ? V(0) : static_cast<V>(factor);
  }
};

// Sums of one warp, spread over its lanes by channel.
template <typename T>
struct Accumulator {
  Wide<T> sums[SLICES];

  LOCAL_ATTENTION_DEVICE Accumulator() {
    LOCAL_ATTENTION_UNROLL for (int i = 0; i < SLICES; ++i) sums[i] = 0;
  }
  LOCAL_ATTENTION_DEVICE void multiply(Wide<T> factor) {
    LOCAL_ATTENTION_UNROLL for (int i = 0; i < SLICES; ++i) sums[i] *= factor;
  }
  LOCAL_ATTENTION_DEVICE void add(Wide<T> weight, const T* row, int channels) {
    LOCAL_ATTENTION_UNROLL for (int i = 0; i < SLICES; ++i) {
      const int c = lane_index() + 32 * i;
      if (c < channels) sums[i] += weight * to_wide(row[c]);
    }
  }
  LOCAL_ATTENTION_DEVICE void write(T* row, int channels) const {
    LOCAL_ATTENTION_UNROLL for (int i = 0; i < SLICES; ++i) {
      const int c = lane_index() + 32 * i;
      if (c < channels) store(row + c, sums[i]);
    }
  }
};

struct Site {
  int batch, head, y, x;
  bool exists;
};

// The cell that this warp works on: cells are numbered like a contiguous [B, Y, X, H].
LOCAL_ATTENTION_DEVICE Site site_of_warp(int64_t batch, int64_t rows, int64_t columns, int64_t heads) {
  int64_t n = block_index() * WARPS + warp_index();
  Site site;
  site.exists = n < batch * rows * columns * heads;
  site.head = static_cast<int>(n % heads);
  n /= heads;
  site.x = static_cast<int>(n % columns);
  n /= columns;
  site.y = static_cast<int>(n % rows);
  site.batch = static_cast<int>(n / rows);
  return site;
}

LOCAL_ATTENTION_DEVICE int64_t query_number(const Problem& p, int batch, int y, int x, int head) {
  return ((batch * p.rows + y) * p.columns + x) * p.heads + head;
}

template <typename T>
struct Softmax {
  Wide<T> largest, sum;
  Accumulator<T> out;
};

template <typename T, Part PART>
LOCAL_ATTENTION_DEVICE void attend(const Problem& p, const Site& site, const T* query, Softmax<T>& softmax) {
  using W = Wide<T>;
  if (!present<PART>(p)) return;
  const Keys<T, PART> keys(p, site.batch, site.head);
  const Dropout dropout(p, site.batch, site.head);
  const Rectangle reach = keys.reach(site.y, site.x);
  const int count = reach.count(), channels = static_cast<int>(p.channels);
  const int query_index = site.y * static_cast<int>(p.columns) + site.x;
  for (int first = 0; first < count; first += 32) {
    const int n = first + lane_index();
    W score = minus_infinity(), factor = 0;
    if (n < count) {
      const int y = reach.top + n / reach.columns, x = reach.left + n % reach.columns;
      if (keys.visible(site.y, site.x, y, x)) {
        score = static_cast<W>(p.scale) * dot(query, keys.key.at(y, x), channels) + keys.bias(x);
        factor = dropout.of<W>(query_index, keys.slot(site.y, site.x, y, x));
      }
    }
    const W most = warp_largest(score);
    const W largest = most > softmax.largest ? most : softmax.largest;
    const W reference = largest == minus_infinity() ? W(0) : largest;  // nothing seen yet: all weights 0
    const W shrink = exponential(softmax.largest - reference), weight = exponential(score - reference);
    softmax.sum = softmax.sum * shrink + warp_sum(weight);
    softmax.out.multiply(shrink);
    softmax.largest = largest;
    for (int j = 0; j < 32 && first + j < count; ++j) {
      const W w = shuffle(weight * factor, j);
      const int m = first + j;
      if (w != 0)
        softmax.out.add(w, keys.value.at(reach.top + m / reach.columns, reach.left + m % reach.columns), channels);
    }
  }
}

template <typename T>
LOCAL_ATTENTION_KERNEL(32 * WARPS, 1)
forward(const Problem p) {
  using W = Wide<T>;
  const Site site = site_of_warp(p.batch, p.rows, p.columns, p.heads);
  if (!site.exists) return;
  const T* query = Plane<T>(p.query, site.batch, site.head).at(site.y, site.x);
  Softmax<T> softmax;
  softmax.largest = minus_infinity();
  softmax.sum = 0;
  attend<T, TOKENS>(p, site, query, softmax);
  attend<T, CROSS>(p, site, query, softmax);
  attend<T, LOCAL>(p, site, query, softmax);
  softmax.out.multiply(softmax.sum > 0 ? 1 / softmax.sum : W(0));
  softmax.out.write(Plane<T>(p.out, site.batch, site.head).at(site.y, site.x), static_cast<int>(p.channels));
  if (lane_index() == 0)
    static_cast<W*>(p.lse)[query_number(p, site.batch, site.y, site.x, site.head)] =
        softmax.sum > 0 ? softmax.largest + logarithm(softmax.sum) : W(minus_infinity());
}

// The gradient of one score, and the weight that the value was summed with.
template <typename W>
struct ScoreGradient {
  W score, weight;
};

// `delta` is rowsum(out * grad_out) minus the gradient of lse.
template <typename T, Part PART>
LOCAL_ATTENTION_DEVICE ScoreGradient<Wide<T>> score_gradient(const Problem& p, const Keys<T, PART>& keys,
                                                             const Dropout& dropout, const T* query, const T* grad_out,
                                                             Wide<T> lse, Wide<T> delta, int y, int x, int key_y,
                                                             int key_x) {
  using W = Wide<T>;
  if (lse == minus_infinity() || !keys.visible(y, x, key_y, key_x)) return {W(0), W(0)};
  const int channels = static_cast<int>(p.channels);
  const W score = static_cast<W>(p.scale) * dot(query, keys.key.at(key_y, key_x), channels) + keys.bias(key_x);
  const W weight = exponential(score - lse);
  const W factor = dropout.of<W>(y * static_cast<int>(p.columns) + x, keys.slot(y, x, key_y, key_x));
  const W grad_weight = factor * dot(grad_out, keys.value.at(key_y, key_x), channels);
  return {weight * (grad_weight - delta), weight * factor};
}

template <typename T, Part PART>
LOCAL_ATTENTION_DEVICE void add_query_gradient(const Problem& p, const Site& site, const T* query, const T* grad_out,
                                               Wide<T> lse, Wide<T> delta, Accumulator<T>& sum) {
  using W = Wide<T>;
  if (!present<PART>(p)) return;
  const Keys<T, PART> keys(p, site.batch, site.head);
  const Dropout dropout(p, site.batch, site.head);
  const Rectangle reach = keys.reach(site.y, site.x);
  const int count = reach.count();
  for (int first = 0; first < count; first += 32) {
    const int n = first + lane_index();
    W gradient = 0;
    if (n < count)
      gradient = score_gradient(p, keys, dropout, query, grad_out, lse, delta, site.y, site.x,
                                reach.top + n / reach.columns, reach.left + n % reach.columns)
                     .score;
    for (int j = 0; j < 32 && first + j < count; ++j) {
      const W w = shuffle(gradient, j);
      const int m = first + j;
      if (w != 0)
        sum.add(w, keys.key.at(reach.top + m / reach.columns, reach.left + m % reach.columns),
                static_cast<int>(p.channels));
    }
  }
}

// `deltas`: [B, Y, X, H], see score_gradient.
template <typename T>
LOCAL_ATTENTION_KERNEL(32 * WARPS, 1)
query_gradient(const Problem p, Wide<T>* deltas) {
  using W = Wide<T>;
  const Site site = site_of_warp(p.batch, p.rows, p.columns, p.heads);
  if (!site.exists) return;
  const int channels = static_cast<int>(p.channels);
  const T* query = Plane<T>(p.query, site.batch, site.head).at(site.y, site.x);
  const T* grad_out = Plane<T>(p.grad_out, site.batch, site.head).at(site.y, site.x);
  const T* out = Plane<T>(p.out, site.batch, site.head).at(site.y, site.x);
  const int64_t number = query_number(p, site.batch, site.y, site.x, site.head);
  W delta = 0;
  for (int c = lane_index(); c < channels; c += 32) delta += to_wide(out[c]) * to_wide(grad_out[c]);
  delta = warp_sum(delta);
  if (p.grad_lse) delta -= static_cast<const W*>(p.grad_lse)[number];
  if (lane_index() == 0) deltas[number] = delta;
  if (!p.grad_query.data) return;
  const W lse = static_cast<const W*>(p.lse)[number];
  Accumulator<T> sum;
  add_query_gradient<T, TOKENS>(p, site, query, grad_out, lse, delta, sum);
  add_query_gradient<T, CROSS>(p, site, query, grad_out, lse, delta, sum);
  add_query_gradient<T, LOCAL>(p, site, query, grad_out, lse, delta, sum);
  sum.multiply(static_cast<W>(p.scale));
  sum.write(Plane<T>(p.grad_query, site.batch, site.head).at(site.y, site.x), channels);
}

// `bias_parts`: for every key the sum of its score gradients, [B, H, T] or [B, Y', X', H]; null: not wanted.
template <typename T, Part PART>
LOCAL_ATTENTION_KERNEL(32 * WARPS, 1)
key_gradient(const Problem p, const Wide<T>* deltas, Wide<T>* bias_parts) {
  using W = Wide<T>;
  const Site site = site_of_warp(p.batch, PART == TOKENS ? 1 : PART == CROSS ? p.cross_rows : p.rows,
                                 PART == TOKENS ? p.tokens : PART == CROSS ? p.cross_columns : p.columns, p.heads);
  if (!site.exists) return;
  const Keys<T, PART> keys(p, site.batch, site.head);
  const Dropout dropout(p, site.batch, site.head);
  const Plane<T> query(p.query, site.batch, site.head), grad_out(p.grad_out, site.batch, site.head);
  const Rectangle seen_by = keys.seen_by(site.y, site.x);
  const int count = seen_by.count(), channels = static_cast<int>(p.channels);
  Accumulator<T> grad_key, grad_value;
  W bias = 0;
  for (int first = 0; first < count; first += 32) {
    const int n = first + lane_index();
    ScoreGradient<W> gradient = {W(0), W(0)};
    if (n < count) {
      const int y = seen_by.top + n / seen_by.columns, x = seen_by.left + n % seen_by.columns;
      const int64_t number = query_number(p, site.batch, y, x, site.head);
      gradient = score_gradient(p, keys, dropout, query.at(y, x), grad_out.at(y, x),
                                static_cast<const W*>(p.lse)[number], deltas[number], y, x, site.y, site.x);
    }
    bias += gradient.score;
    for (int j = 0; j < 32 && first + j < count; ++j) {
      const W score = shuffle(gradient.score, j), weight = shuffle(gradient.weight, j);
      const int y = seen_by.top + (first + j) / seen_by.columns, x = seen_by.left + (first + j) % seen_by.columns;
      if (score != 0) grad_key.add(score, query.at(y, x), channels);
      if (weight != 0) grad_value.add(weight, grad_out.at(y, x), channels);
    }
  }
  grad_key.multiply(static_cast<W>(p.scale));
  const Plane<T> key_target(PART == TOKENS ? p.grad_token_key : PART == CROSS ? p.grad_cross_key : p.grad_key,
                            site.batch, site.head);
  const Plane<T> value_target(PART == TOKENS ? p.grad_token_value : PART == CROSS ? p.grad_cross_value : p.grad_value,
                              site.batch, site.head);
  if (key_target.data) grad_key.write(key_target.at(site.y, site.x), channels);
  if (value_target.data) grad_value.write(value_target.at(site.y, site.x), channels);
  if (PART == LOCAL || !bias_parts) return;
  bias = warp_sum(bias);
  const int64_t part = PART == TOKENS ? (site.batch * p.heads + site.head) * p.tokens + site.x
                                      : ((site.batch * p.cross_rows + site.y) * p.cross_columns + site.x) * p.heads +
                                            site.head;
  if (lane_index() == 0) bias_parts[part] = bias;
}

constexpr int REDUCTION_THREADS = 256;

// parts [B, H, T] -> sums [B, T], head after head.
template <typename W>
LOCAL_ATTENTION_KERNEL(REDUCTION_THREADS, 1)
sum_token_bias(const W* parts, W* sums, int64_t batch, int64_t heads, int64_t tokens) {
  const int64_t n = block_index() * REDUCTION_THREADS + thread_index();
  if (n >= batch * tokens) return;
  double sum = 0;
  for (int64_t head = 0; head < heads; ++head) sum += parts[(n / tokens * heads + head) * tokens + n % tokens];
  sums[n] = static_cast<W>(sum);
}

// One block sums `count` numbers in a fixed order; shared memory: one double per warp.
template <typename W>
LOCAL_ATTENTION_KERNEL(REDUCTION_THREADS, 1)
sum_all(const W* parts, W* sum, int64_t count) {
  double* of_warps = reinterpret_cast<double*>(shared_memory());
  double own = 0;
  for (int64_t n = thread_index(); n < count; n += REDUCTION_THREADS) own += parts[n];
  own = warp_sum(own);
  if (lane_index() == 0) of_warps[warp_index()] = own;
  block_barrier();
  if (thread_index() != 0) return;
  double total = 0;
  for (int warp = 0; warp < REDUCTION_THREADS / 32; ++warp) total += of_warps[warp];
  *sum = static_cast<W>(total);
}

template <typename W>
void reduce_token_bias(Failure& failure, const Problem& p, const W* parts, Stream stream) {
  launch(failure, sum_token_bias<W>, (p.batch * p.tokens + REDUCTION_THREADS - 1) / REDUCTION_THREADS,
         REDUCTION_THREADS, 0, stream, parts, static_cast<W*>(p.grad_token_bias), p.batch, p.heads, p.tokens);
}

template <typename W>
void reduce_cross_bias(Failure& failure, const Problem& p, const W* parts, int64_t count, Stream stream) {
  launch(failure, sum_all<W>, 1, REDUCTION_THREADS, REDUCTION_THREADS / 32 * 8, stream, parts,
         static_cast<W*>(p.grad_cross_bias), count);
}

inline int64_t blocks_for(int64_t cells) { return (cells + WARPS - 1) / WARPS; }

template <typename T>
void run_forward(Failure& failure, const Problem& p, Stream stream) {
  launch(failure, forward<T>, blocks_for(p.batch * p.rows * p.columns * p.heads), 32 * WARPS, 0, stream, p);
}

// Elements of the workspace, each as wide as the sums.
inline int64_t workspace_elements(const Problem& p) {
  int64_t cells = p.rows * p.columns + p.tokens;
  if (p.cross_key.data) cells += p.cross_rows * p.cross_columns;
  return p.batch * p.heads * cells;
}

template <typename T>
void run_backward(Failure& failure, const Problem& p, Stream stream) {
  using W = Wide<T>;
  const int64_t planes = p.batch * p.heads, cross_cells = p.cross_rows * p.cross_columns;
  W* deltas = static_cast<W*>(p.workspace);
  W* token_parts = deltas + planes * p.rows * p.columns;
  W* cross_parts = token_parts + planes * p.tokens;
  launch(failure, query_gradient<T>, blocks_for(planes * p.rows * p.columns), 32 * WARPS, 0, stream, p, deltas);
  if (present<LOCAL>(p) && (p.grad_key.data || p.grad_value.data))
    launch(failure, key_gradient<T, LOCAL>, blocks_for(planes * p.rows * p.columns), 32 * WARPS, 0, stream, p, deltas,
           static_cast<W*>(nullptr));
  if (present<CROSS>(p) && (p.grad_cross_key.data || p.grad_cross_value.data || p.grad_cross_bias))
    launch(failure, key_gradient<T, CROSS>, blocks_for(planes * cross_cells), 32 * WARPS, 0, stream, p, deltas,
           p.grad_cross_bias ? cross_parts : static_cast<W*>(nullptr));
  if (present<TOKENS>(p) && (p.grad_token_key.data || p.grad_token_value.data || p.grad_token_bias))
    launch(failure, key_gradient<T, TOKENS>, blocks_for(planes * p.tokens), 32 * WARPS, 0, stream, p, deltas,
           p.grad_token_bias ? token_parts : static_cast<W*>(nullptr));
  if (present<TOKENS>(p) && p.grad_token_bias) reduce_token_bias(failure, p, token_parts, stream);
  if (p.grad_cross_bias) reduce_cross_bias(failure, p, cross_parts, planes * cross_cells, stream);
}

}  // namespace plain
}  // namespace local_attention
