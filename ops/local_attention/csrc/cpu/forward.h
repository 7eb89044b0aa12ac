// Forward: per band of query rows, scores into a buffer [slot][row][column], softmax over slots, weighted sum.
#pragma once

#include "grid.h"

namespace local_attention {

template <class S, class T>
class Forward {
 public:
  Forward(const Problem& problem, char* block)
      : p_(problem),
        arena_(block),
        sizes_(problem),
        local_(problem.key.data ? local_segment(problem) : Segment{}),
        cross_(problem.cross_key.data ? cross_segment(problem) : Segment{}),
        slot_(spread<T>(static_cast<ptrdiff_t>(SCORE_ROWS) * sizes_.wide_columns)),
        queries_(arena_, sizes_, sizes_.rows, sizes_.columns, SCORE_ROWS),
        tiles_(arena_, sizes_),
        local_keys_(arena_, sizes_, local_, window_ring(local_), false),
        cross_keys_(arena_, sizes_, cross_, window_ring(cross_), false),
        local_values_(arena_, sizes_, local_.rows, local_.columns, window_ring(local_)),
        cross_values_(arena_, sizes_, cross_.rows, cross_.columns, window_ring(cross_)),
        token_keys_(arena_, sizes_, 1, sizes_.tokens, 1),
        token_values_(arena_, sizes_, 1, sizes_.tokens, 1) {
    scores_ = arena_.take<T>(total_slots(problem) * slot_);
    out_ = arena_.take<T>(static_cast<ptrdiff_t>(sizes_.wide_columns) * sizes_.wide_channels);
    inverse_ = arena_.take<T>(sizes_.wide_columns);
    logs_ = arena_.take<T>(sizes_.wide_columns);
  }

  ptrdiff_t bytes() const { return arena_.used(); }

  // Query rows [begin, end) of one head.
  void band(int64_t batch, int64_t head, int begin, int end) {
    batch_ = batch;
    head_ = head;
    queries_.start(p_.query, batch, head, begin);
    if (p_.key.data) {
      const int row = local_.low_row(begin);
      local_keys_.start(p_.key, batch, head, row);
      local_values_.start(p_.value, batch, head, row);
    }
    if (p_.cross_key.data) {
      const int row = cross_.low_row(begin / cross_.row_ratio);
      cross_keys_.start(p_.cross_key, batch, head, row);
      cross_values_.start(p_.cross_value, batch, head, row);
    }
    if (sizes_.tokens) {
      token_keys_.start(p_.token_key, batch, head, 0);
      token_values_.start(p_.token_value, batch, head, 0);
      token_keys_.advance(0);
      token_values_.advance(0);
    }
    for (int y = begin; y < end; y += SCORE_ROWS) {
      const int rows = std::min(SCORE_ROWS, end - y);
      score(y, rows);
      for (int r = 0; r < rows; ++r) finish_row(y + r, scores_ + r * sizes_.wide_columns);
    }
  }

 private:
  void score(int y, int rows) {
    constexpr T hidden = -std::numeric_limits<T>::infinity();
    const ptrdiff_t row = sizes_.wide_columns;
    queries_.advance(y + rows - 1);
    tiles_.fill(queries_.cells(), y, rows, static_cast<T>(p_.scale));
    if (sizes_.tokens) score_all_tokens(sizes_, tiles_, token_keys_.cells(), rows, scores_, row, slot_);
    if (p_.cross_key.data) {
      const int last = cross_.high_row((y + rows - 1) / cross_.row_ratio);
      cross_keys_.advance(last);
      cross_values_.advance(last);
      score_segment(sizes_, cross_, tiles_, cross_keys_, y, rows, scores_, row, slot_, hidden);
    }
    if (p_.key.data) {
      const int last = local_.high_row(y + rows - 1);
      local_keys_.advance(last);
      local_values_.advance(last);
      score_segment(sizes_, local_, tiles_, local_keys_, y, rows, scores_, row, slot_, hidden);
    }
  }

  template <class F>
  void for_slots(int y, F visit) const {
    if (sizes_.tokens) visit(0, sizes_.tokens);
    if (p_.cross_key.data) for_slots_of_row(cross_, y, visit);
    if (p_.key.data) for_slots_of_row(local_, y, visit);
  }

  void finish_row(int y, T* scores) {
    add_biases(y, scores);
    softmax(y, scores);
    std::fill(out_, out_ + static_cast<ptrdiff_t>(sizes_.columns) * sizes_.wide_channels, T(0));
    if (sizes_.tokens) sum_tokens(sizes_, token_values_.cells(), scores, slot_, out_);
    if (p_.cross_key.data) sum_segment(sizes_, cross_, cross_values_.cells(), scores, slot_, y, out_);
    if (p_.key.data) sum_segment(sizes_, local_, local_values_.cells(), scores, slot_, y, out_);
    S* out = static_cast<S*>(p_.out.data) + batch_ * p_.out.batch + head_ * p_.out.head + y * p_.out.row;
    store_cells(out_, sizes_.columns, sizes_, inverse_, T(1), out, p_.out.column);
    T* lse = static_cast<T*>(p_.lse) + ((batch_ * p_.rows + y) * p_.columns) * p_.heads + head_;
    for (int x = 0; x < sizes_.columns; ++x) lse[x * p_.heads] = logs_[x];
  }

  void add_biases(int y, T* scores) const {
    using V = Simd<T>;
    if (p_.token_bias) {
      const T* bias = static_cast<const T*>(p_.token_bias) + batch_ * p_.tokens;
      for (int t = 0; t < sizes_.tokens; ++t)
        for (int x = 0; x < sizes_.columns; x += V::LANES)
          V::store(scores + t * slot_ + x, V::load(scores + t * slot_ + x) + bias[t]);
    }
    if (p_.cross_key.data && p_.cross_bias) {
      const T bias = *static_cast<const T*>(p_.cross_bias);
      for_slots_of_row(cross_, y, [&](int from, int to) {
        for (int s = from; s < to; ++s)
          for (int x = 0; x < sizes_.columns; x += V::LANES)
            V::store(scores + s * slot_ + x, V::load(scores + s * slot_ + x) + bias);
      });
    }
  }

  // Scores become exp(score - highest), or 0 where dropped; inverse_ and logs_ get 1 / sum and the lse.
  void softmax(int y, T* scores) {
    using V = Simd<T>;
    const T factor = static_cast<T>(1 / (1 - p_.dropout));
    const uint32_t threshold = dropout_threshold(p_.dropout);
    const uint32_t stream = p_.seed ? dropout_stream(*p_.seed, batch_ * p_.heads + head_) : 0;
    for (int x = 0; x < sizes_.columns; x += V::LANES) {
      typename V::Vector highest = V::fill(-std::numeric_limits<T>::infinity()), sum{};
      for_slots(y, [&](int from, int to) {
        for (int s = from; s < to; ++s) {
          const typename V::Vector score = V::load(scores + s * slot_ + x);
          highest = score > highest ? score : highest;
        }
      });
      uint32_t bits[V::LANES] = {};
      if (p_.seed)
        for (int i = 0; i < V::LANES; ++i) bits[i] = dropout_query(stream, y * sizes_.columns + x + i);
      for_slots(y, [&](int from, int to) {
        for (int s = from; s < to; ++s) {
          T* at = scores + s * slot_ + x;
          const typename V::Vector weight = exponential(V::load(at) - highest);
          sum += weight;
          V::store(at, p_.seed ? weight * kept<T>(bits, s, threshold, factor) : weight);
        }
      });
      V::store(inverse_ + x, 1 / sum);
      for (int i = 0; i < V::LANES; ++i) logs_[x + i] = highest[i] + std::log(sum[i]);
    }
  }

  const Problem& p_;
  Arena arena_;
  Sizes<T> sizes_;
  Segment local_, cross_;
  ptrdiff_t slot_;
  CellRows<S, T> queries_;
  QueryTiles<T> tiles_;
  KeyRows<S, T> local_keys_, cross_keys_;
  CellRows<S, T> local_values_, cross_values_, token_keys_, token_values_;
  T *scores_, *out_, *inverse_, *logs_;
  int64_t batch_ = 0, head_ = 0;
};

}  // namespace local_attention
