// Backward of one head, without atomics. The walk goes down the query rows once. The weights and their gradients of
// the last rows lie in planes [row % ring][slot][column]; as soon as all queries that see a key row are among them,
// that key row gathers its gradients. Every sum has one fixed order.
#pragma once

#include "grid.h"

namespace local_attention {

template <class S, class T>
class Backward {
 public:
  Backward(const Problem& problem, char* block)
      : p_(problem),
        arena_(block),
        sizes_(problem),
        local_(problem.key.data ? local_segment(problem) : Segment{}),
        cross_(problem.cross_key.data ? cross_segment(problem) : Segment{}),
        ring_(std::min(sizes_.rows, query_ring())),
        slot_(spread<T>(sizes_.wide_columns)),
        row_(total_slots(problem) * slot_),
        queries_(arena_, sizes_, sizes_.rows, sizes_.columns, ring_),
        grads_(arena_, sizes_, sizes_.rows, sizes_.columns, ring_),
        query_tiles_(arena_, sizes_),
        grad_tiles_(arena_, sizes_),
        local_keys_(arena_, sizes_, local_, window_ring(local_), true),
        local_values_(arena_, sizes_, local_, window_ring(local_), false),
        cross_keys_(arena_, sizes_, cross_, window_ring(cross_), true),
        cross_values_(arena_, sizes_, cross_, window_ring(cross_), false),
        token_keys_(arena_, sizes_, 1, sizes_.tokens, 1),
        token_values_(arena_, sizes_, 1, sizes_.tokens, 1) {
    const ptrdiff_t across = std::max(sizes_.wide_columns, cross_.columns);
    weights_ = arena_.take<T>(ring_ * row_);
    slopes_ = arena_.take<T>(ring_ * row_);
    sums_ = arena_.take<T>(across * sizes_.wide_channels);
    token_sums_ = arena_.take<T>(2 * static_cast<ptrdiff_t>(sizes_.tokens) * sizes_.wide_channels);
    bias_sums_ = arena_.take<double>(sizes_.tokens + 1);
    logs_ = arena_.take<T>(sizes_.wide_columns);
    shifts_ = arena_.take<T>(sizes_.wide_columns);
  }

  ptrdiff_t bytes() const { return arena_.used(); }

  // grad_bias [T] and grad_cross_bias [1] get this head's share.
  void head(int64_t batch, int64_t head, T* grad_bias, T* grad_cross_bias) {
    batch_ = batch;
    head_ = head;
    start();
    int next_local = 0, next_cross = 0;
    for (int y = 0; y < sizes_.rows; y += SCORE_ROWS) {
      const int rows = std::min(SCORE_ROWS, sizes_.rows - y), end = y + rows;
      score(y, rows);
      for (int r = y; r < end; ++r) {
        weigh_row(r);
        if (p_.grad_query.data) query_row(r);
        if (sizes_.tokens) token_row(r);
      }
      if (p_.key.data) next_local = finished_keys(local_, p_.grad_key, p_.grad_value, next_local, end);
      if (p_.cross_key.data)
        next_cross = finished_keys(cross_, p_.grad_cross_key, p_.grad_cross_value, next_cross, end);
    }
    for (int t = 0; t < sizes_.tokens; ++t) grad_bias[t] = static_cast<T>(bias_sums_[t]);
    *grad_cross_bias = static_cast<T>(bias_sums_[sizes_.tokens]);
    const T* token_values = token_sums_ + static_cast<ptrdiff_t>(sizes_.tokens) * sizes_.wide_channels;
    if (p_.grad_token_key.data) store(p_.grad_token_key, 0, token_sums_, sizes_.tokens, static_cast<T>(p_.scale));
    if (p_.grad_token_value.data) store(p_.grad_token_value, 0, token_values, sizes_.tokens, T(1));
  }

 private:
  // Query rows that one key row needs, and the rows of the step that completes them.
  int query_ring() const {
    return std::max(local_.rows ? local_.slot_rows() : 1, cross_.rows ? cross_.slot_rows() * cross_.row_ratio : 1) +
           SCORE_ROWS - 1;
  }

  void start() {
    queries_.start(p_.query, batch_, head_, 0);
    grads_.start(p_.grad_out, batch_, head_, 0);
    if (p_.key.data) {
      local_keys_.start(p_.key, batch_, head_, 0);
      local_values_.start(p_.value, batch_, head_, 0);
    }
    if (p_.cross_key.data) {
      cross_keys_.start(p_.cross_key, batch_, head_, 0);
      cross_values_.start(p_.cross_value, batch_, head_, 0);
    }
    if (sizes_.tokens) {
      token_keys_.start(p_.token_key, batch_, head_, 0);
      token_values_.start(p_.token_value, batch_, head_, 0);
      token_keys_.advance(0);
      token_values_.advance(0);
    }
    std::fill(token_sums_, token_sums_ + 2 * static_cast<ptrdiff_t>(sizes_.tokens) * sizes_.wide_channels, T(0));
    std::fill(bias_sums_, bias_sums_ + sizes_.tokens + 1, 0.0);
  }

  T* weights(int y) const { return weights_ + (y % ring_) * row_; }
  T* slopes(int y) const { return slopes_ + (y % ring_) * row_; }

  // Scores into the weights' planes, grad_out . value into the slopes'.
  void score(int y, int rows) {
    constexpr T hidden = -std::numeric_limits<T>::infinity();
    // Where the two rows of the step lie around the end of the ring, their distance is negative.
    const ptrdiff_t apart = rows == 2 ? weights(y + 1) - weights(y) : 0;
    queries_.advance(y + rows - 1);
    grads_.advance(y + rows - 1);
    query_tiles_.fill(queries_.cells(), y, rows, static_cast<T>(p_.scale));
    grad_tiles_.fill(grads_.cells(), y, rows, T(1));
    if (sizes_.tokens) {
      score_all_tokens(sizes_, query_tiles_, token_keys_.cells(), rows, weights(y), apart, slot_);
      score_all_tokens(sizes_, grad_tiles_, token_values_.cells(), rows, slopes(y), apart, slot_);
    }
    const auto both = [&](const Segment& segment, KeyRows<S, T>& keys, KeyRows<S, T>& values) {
      const int last = segment.high_row((y + rows - 1) / segment.row_ratio);
      keys.advance(last);
      values.advance(last);
      score_segment<S>(sizes_, segment, query_tiles_, keys, y, rows, weights(y), apart, slot_, hidden);
      score_segment<S>(sizes_, segment, grad_tiles_, values, y, rows, slopes(y), apart, slot_, T(0));
    };
    if (p_.cross_key.data) both(cross_, cross_keys_, cross_values_);
    if (p_.key.data) both(local_, local_keys_, local_values_);
  }

  // Scores become softmax weights (as applied to the values, so with dropout), slopes the gradients of the scores.
  void weigh_row(int y) {
    using V = Simd<T>;
    const int64_t first = (batch_ * p_.rows + y) * p_.columns;
    const T* lse = static_cast<const T*>(p_.lse) + first * p_.heads + head_;
    const T* grad_lse = p_.grad_lse ? static_cast<const T*>(p_.grad_lse) + first * p_.heads + head_ : nullptr;
    const S* out = head_pointer<S>(p_.out, batch_, head_) + y * p_.out.row;
    std::fill(logs_, logs_ + sizes_.wide_columns, T(0));
    std::fill(shifts_, shifts_ + sizes_.wide_columns, T(0));
    copy_cells(out, p_.out.column, sizes_.columns, sizes_, sums_);
    for (int x = 0; x < sizes_.columns; ++x) {
      const T *a = sums_ + static_cast<ptrdiff_t>(x) * sizes_.wide_channels, *b = grads_.cells().at(y, x);
      typename V::Vector products{};
      for (int d = 0; d < sizes_.wide_channels; d += V::LANES) products += V::load(a + d) * V::load(b + d);
      T product = 0;
      for (int i = 0; i < V::LANES; ++i) product += products[i];
      logs_[x] = lse[x * p_.heads];
      shifts_[x] = product - (grad_lse ? grad_lse[x * p_.heads] : T(0));
    }
    const T factor = static_cast<T>(1 / (1 - p_.dropout));
    const uint32_t threshold = dropout_threshold(p_.dropout);
    const uint32_t stream = p_.seed ? dropout_stream(*p_.seed, batch_ * p_.heads + head_) : 0;
    const T cross_bias = p_.cross_bias ? *static_cast<const T*>(p_.cross_bias) : T(0);
    const T* token_bias = p_.token_bias ? static_cast<const T*>(p_.token_bias) + batch_ * p_.tokens : nullptr;
    for (int x = 0; x < sizes_.columns; x += V::LANES) {
      const typename V::Vector log = V::load(logs_ + x), shift = V::load(shifts_ + x);
      uint32_t bits[V::LANES] = {};
      if (p_.seed)
        for (int i = 0; i < V::LANES; ++i) bits[i] = dropout_query(stream, y * sizes_.columns + x + i);
      const auto weigh = [&](int s, T bias) {
        T *weight_at = weights(y) + s * slot_ + x, *slope_at = slopes(y) + s * slot_ + x;
        const typename V::Vector weight = exponential(V::load(weight_at) + bias - log);
        typename V::Vector slope = V::load(slope_at);
        if (p_.seed) {
          const typename V::Vector keep = kept<T>(bits, s, threshold, factor);
          slope *= keep;
          V::store(weight_at, weight * keep);
        } else {
          V::store(weight_at, weight);
        }
        V::store(slope_at, weight * (slope - shift));
      };
      for (int t = 0; t < sizes_.tokens; ++t) weigh(t, token_bias ? token_bias[t] : T(0));
      const auto range = [&](T bias) {
        return [&weigh, bias](int from, int to) {
          for (int s = from; s < to; ++s) weigh(s, bias);
        };
      };
      if (p_.cross_key.data) for_slots_of_row(cross_, y, range(cross_bias));
      if (p_.key.data) for_slots_of_row(local_, y, range(T(0)));
    }
    for (int t = 0; t < sizes_.tokens; ++t) add_slopes(y, t, bias_sums_[t]);
    if (p_.cross_key.data)
      for_slots_of_row(cross_, y, [&](int from, int to) {
        for (int s = from; s < to; ++s) add_slopes(y, s, bias_sums_[sizes_.tokens]);
      });
  }

  void add_slopes(int y, int slot, double& sum) const {
    const T* row = slopes(y) + slot * slot_;
    for (int x = 0; x < sizes_.columns; ++x) sum += row[x];
  }

  void clear(int cells) { std::fill(sums_, sums_ + static_cast<ptrdiff_t>(cells) * sizes_.wide_channels, T(0)); }

  void store(const View& view, int row, const T* from, int cells, T factor) {
    S* to = static_cast<S*>(view.data) + batch_ * view.batch + head_ * view.head + row * view.row;
    store_cells(from, cells, sizes_, static_cast<const T*>(nullptr), factor, to, view.column);
  }

  void query_row(int y) {
    clear(sizes_.columns);
    if (sizes_.tokens) sum_tokens(sizes_, token_keys_.cells(), slopes(y), slot_, sums_);
    if (p_.cross_key.data) sum_segment(sizes_, cross_, cross_keys_.cells(), slopes(y), slot_, y, sums_);
    if (p_.key.data) sum_segment(sizes_, local_, local_keys_.cells(), slopes(y), slot_, y, sums_);
    store(p_.grad_query, y, sums_, sizes_.columns, static_cast<T>(p_.scale));
  }

  // The share of one query row in the gradients of the tokens.
  void token_row(int y) {
    T* const values = token_sums_ + static_cast<ptrdiff_t>(sizes_.tokens) * sizes_.wide_channels;
    for (int t = 0; t < sizes_.tokens; t += SUM_TARGETS) {
      const int targets = std::min(SUM_TARGETS, sizes_.tokens - t);
      const auto add = [&](T* to, const T* planes, const Cells<T>& source) {
        weighted_sum(Sum<T>{to + static_cast<ptrdiff_t>(t) * sizes_.wide_channels, sizes_.wide_channels,
                            source.at(y, 0), 0, source.column, planes + t * slot_, 0, 1, slot_, 1, 0, sizes_.columns,
                            0},
                     targets, sizes_.channel_vectors);
      };
      if (p_.grad_token_key.data) add(token_sums_, slopes(y), queries_.cells());
      if (p_.grad_token_value.data) add(values, weights(y), grads_.cells());
    }
  }

  // Gradients of the key rows from `next` on whose queries all lie above query row `end`; returns the next one.
  int finished_keys(const Segment& segment, const View& grad_key, const View& grad_value, int next, int end) {
    // The centres above `end` are complete; a key row is seen by centres up to `top` rows below it.
    const int centres = end / segment.row_ratio;
    const int until = centres == segment.rows ? segment.rows : centres - segment.window.top;
    for (; next < until; ++next) {
      key_row(segment, grad_value, weights_, grads_.cells(), next, T(1));
      key_row(segment, grad_key, slopes_, queries_.cells(), next, static_cast<T>(p_.scale));
    }
    return next;
  }

  // For every key of a row: the sum over the queries that see it of plane[its slot there] * source[query].
  void key_row(const Segment& segment, const View& target, const T* planes, const Cells<T>& source, int row, T factor) {
    if (!target.data) return;
    const Window& window = segment.window;
    clear(segment.columns);
    const int high = std::min(segment.rows - 1, row + window.top);
    for (int dy = 0; dy < segment.row_ratio; ++dy)
      for (int first = std::max(0, row - window.bottom), last; first <= high; first = last + 1) {
        // A stretch of centres that see as many columns each, and whose queries do not wrap around the ring.
        const int seen = segment.seen_columns(row - first), turn = (first * segment.row_ratio + dy) / ring_;
        for (last = first; last < high; ++last)
          if (segment.seen_columns(row - last - 1) != seen || ((last + 1) * segment.row_ratio + dy) / ring_ != turn)
            break;
        for (int dx = 0; dx < segment.column_ratio; ++dx)
          key_row_from(segment, planes, source, row, first, last, dy, dx);
      }
    store(target, row, sums_, segment.columns, factor);
  }

  // The share of the queries (centre * row ratio + dy, centre column * column ratio + dx), centres first .. last.
  void key_row_from(const Segment& segment, const T* planes, const Cells<T>& source, int row, int first, int last,
                    int dy, int dx) {
    const int u = row - first, a = segment.row_ratio, b = segment.column_ratio, y = first * a + dy;
    const int seen = segment.seen_columns(u), right = seen - 1 - segment.window.left;
    const int slot = segment.first_slot + (u + segment.window.top) * segment.slot_columns() + seen - 1;
    const T* plane = planes + (y % ring_) * row_ + slot * slot_ + dx;
    for (int x = 0; x < segment.columns; x += SUM_TARGETS) {
      const int targets = std::min(SUM_TARGETS, segment.columns - x);
      Sum<T> sum;
      sum.target = sums_ + static_cast<ptrdiff_t>(x) * sizes_.wide_channels;
      sum.target_stride = sizes_.wide_channels;
      // Source o is the query with centre column x - right + o.
      sum.source = source.at(y, 0) + (static_cast<ptrdiff_t>(x - right) * b + dx) * source.column;
      sum.source_row = a * source.row;
      sum.source_stride = b * source.column;
      sum.weights = plane + static_cast<ptrdiff_t>(x - right) * b;
      sum.weight_row = a * row_ - segment.slot_columns() * slot_;
      sum.weight_source = b - slot_;
      sum.weight_target = slot_;
      sum.rows = last - first + 1;
      sum.begin = std::max(0, right - x);
      sum.end = std::min(seen + targets - 1, segment.columns + right - x);
      sum.band = seen;
      weighted_sum(sum, targets, sizes_.channel_vectors);
    }
  }

  const Problem& p_;
  Arena arena_;
  Sizes<T> sizes_;
  Segment local_, cross_;
  int ring_;
  ptrdiff_t slot_, row_;
  CellRows<S, T> queries_, grads_;
  QueryTiles<T> query_tiles_, grad_tiles_;
  KeyRows<S, T> local_keys_, local_values_, cross_keys_, cross_values_;
  CellRows<S, T> token_keys_, token_values_;
  T *weights_, *slopes_, *sums_, *token_sums_, *logs_, *shifts_;
  double* bias_sums_;
  int64_t batch_ = 0, head_ = 0;
};

}  // namespace local_attention
