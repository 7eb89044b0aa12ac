// One (batch, head) as the kernels see it: packed rows of keys and values, and the walk over windows.
#pragma once

#include <algorithm>
#include <climits>
#include <limits>

#include "../problem.h"
#include "kernels.h"

namespace local_attention {

inline ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) / to * to; }

// Elements between the starts of rows that are read together: an odd number of cache lines, so that the rows do not
// compete for the same few sets of the cache.
template <class T>
ptrdiff_t spread(ptrdiff_t n) {
  constexpr ptrdiff_t line = 64 / sizeof(T);
  return ((n + line - 1) / line | 1) * line;
}

inline void prefetch_cells(const void* from, ptrdiff_t stride_bytes, int cells, ptrdiff_t cell_bytes) {
  for (int c = 0; c < cells; ++c)
    for (ptrdiff_t byte = 0; byte < cell_bytes; byte += 64)
      __builtin_prefetch(static_cast<const char*>(from) + c * stride_bytes + byte);
}

// Hands out 64-byte aligned pieces of one block; with a null block it only measures.
class Arena {
 public:
  explicit Arena(char* block) : block_(block) {}
  template <class T>
  T* take(ptrdiff_t count) {
    char* piece = block_ ? block_ + used_ : nullptr;
    used_ += round_up(count * static_cast<ptrdiff_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  ptrdiff_t used() const { return used_; }

 private:
  char* block_;
  ptrdiff_t used_ = 0;
};

// Sizes that all heads share. Rows of queries and channels are padded to whole vectors.
template <class T>
struct Sizes {
  int rows, columns, channels, tokens;
  int channel_vectors, wide_channels, wide_columns;
  explicit Sizes(const Problem& p)
      : rows(static_cast<int>(p.rows)),
        columns(static_cast<int>(p.columns)),
        channels(static_cast<int>(p.channels)),
        tokens(static_cast<int>(p.tokens)),
        channel_vectors((channels + Simd<T>::LANES - 1) / Simd<T>::LANES),
        wide_channels(channel_vectors * Simd<T>::LANES),
        wide_columns(static_cast<int>(round_up(columns, Simd<T>::LANES))) {}
};

// One of the two windows. A query (y, x) is centred on the key cell (y / row_ratio, x / column_ratio).
struct Segment {
  Window window;
  int rows, columns, row_ratio, column_ratio, first_slot;
  int slot_rows() const { return window_rows(window); }
  int slot_columns() const { return window_columns(window); }
  int low_row(int centre) const { return std::max(0, centre - window.top); }
  int high_row(int centre) const { return std::min(rows - 1, centre + window.bottom); }
  // Columns seen in the row at offset u.
  int seen_columns(int u) const { return last_column(window, u) + window.left + 1; }
};

// Key rows that SCORE_ROWS neighbouring query rows see.
inline int window_ring(const Segment& segment) { return segment.rows ? segment.slot_rows() + SCORE_ROWS - 1 : 0; }

inline Segment cross_segment(const Problem& p) {
  return {p.cross_window,
          static_cast<int>(p.cross_rows),
          static_cast<int>(p.cross_columns),
          static_cast<int>(p.rows / p.cross_rows),
          static_cast<int>(p.columns / p.cross_columns),
          static_cast<int>(p.tokens)};
}

inline Segment local_segment(const Problem& p) {
  const int before = static_cast<int>(p.tokens) + (p.cross_key.data ? window_slots(p.cross_window) : 0);
  return {p.window, static_cast<int>(p.rows), static_cast<int>(p.columns), 1, 1, before};
}

inline int total_slots(const Problem& p) {
  return static_cast<int>(p.tokens) + (p.cross_key.data ? window_slots(p.cross_window) : 0) +
         (p.key.data ? window_slots(p.window) : 0);
}

// Cells of one head as whole vectors of T. Row r lies at r % ring.
template <class T>
struct Cells {
  T* data = nullptr;
  ptrdiff_t row = 0, column = 0;
  int ring = 1;
  const T* at(int r, int c) const { return data + (r % ring) * row + c * column; }
};

template <class S>
const S* head_pointer(const View& view, int64_t batch, int64_t head) {
  return static_cast<const S*>(view.data) + batch * view.batch + head * view.head;
}

// Convert a row of cells to T, channels padded with zeros.
template <class S, class T>
void copy_cells(const S* from, ptrdiff_t stride, int cells, const Sizes<T>& sizes, T* to, ptrdiff_t ahead = 0) {
  for (int c = 0; c < cells; ++c) {
    const S* cell = from + c * stride;
    T* target = to + static_cast<ptrdiff_t>(c) * sizes.wide_channels;
    for (size_t byte = 0; byte < sizes.channels * sizeof(S); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(cell + ahead) + byte, 0, 2);
    for (int d = 0; d < sizes.channels; ++d) target[d] = static_cast<T>(widen(cell[d]));
    for (int d = sizes.channels; d < sizes.wide_channels; ++d) target[d] = T(0);
  }
}

// Turn up to LANES cells into columns of [channels][width], times `factor`; columns past the cells become zero.
template <class T>
void transpose_block(const T* from, ptrdiff_t stride, int cells, const Sizes<T>& sizes, T factor, ptrdiff_t width,
                     T* to) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  for (int d0 = 0; d0 < sizes.channels; d0 += L) {
    typename S::Vector block[L];
    if (cells >= L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = S::load(from + i * stride + d0) * factor;
    } else {
      for (int i = 0; i < L; ++i)
        block[i] = i < cells ? S::load(from + i * stride + d0) * factor : typename S::Vector{};
    }
    transpose<T>(block);
    const int used = std::min(L, sizes.channels - d0);
    for (int i = 0; i < used; ++i) S::store(to + (d0 + i) * width, block[i]);
  }
}

// Turn a row of cells into [channels][width]: cell c becomes the columns first + c * repeat and the repeat - 1 after
// it; the other columns are zero.
template <class T>
void transpose_cells(const T* from, ptrdiff_t stride, int cells, const Sizes<T>& sizes, int first, int repeat,
                     ptrdiff_t width, T* to) {
  constexpr int L = Simd<T>::LANES;
  const int end = first + cells * repeat;
  for (int d = 0; d < sizes.channels; ++d) {
    std::fill(to + d * width, to + d * width + first, T(0));
    std::fill(to + d * width + end, to + (d + 1) * width, T(0));
  }
  int done = 0;
  if (repeat == 1)
    for (; done + L <= cells; done += L)
      transpose_block(from + done * stride, stride, L, sizes, T(1), width, to + first + done);
  for (int c = done; c < cells; ++c)
    for (int d = 0; d < sizes.channels; ++d)
      for (int i = 0; i < repeat; ++i) to[d * width + first + c * repeat + i] = from[c * stride + d];
}

// Copies rows of cells of one head as the walk over rows needs them, and keeps the last `ring` of them. The copy is
// what makes the inner loops fast: heads lie far apart in memory, so in place their cells compete for cache sets.
template <class S, class T>
class CellRows {
 public:
  CellRows(Arena& arena, const Sizes<T>& sizes, int rows, int columns, int ring)
      : sizes_(sizes), rows_(rows), columns_(columns) {
    cells_.row = static_cast<ptrdiff_t>(columns) * sizes.wide_channels;
    cells_.column = sizes.wide_channels;
    cells_.ring = std::max(1, std::min(ring, rows));
    cells_.data = arena.take<T>(cells_.ring * cells_.row);
  }

  void start(const View& view, int64_t batch, int64_t head, int first_row) {
    source_ = head_pointer<S>(view, batch, head);
    row_ = view.row;
    column_ = view.column;
    next_ = first_row;
  }

  // Make the rows up to `last` ready. Calls ready(row) after each.
  template <class F>
  void advance(int last, F ready) {
    for (last = std::min(last, rows_ - 1); next_ <= last; ++next_) {
      copy_cells(source_ + next_ * row_, column_, columns_, sizes_, cells_.data + (next_ % cells_.ring) * cells_.row,
                 next_ + SCORE_ROWS < rows_ ? SCORE_ROWS * row_ : 0);
      ready(next_);
    }
  }
  void advance(int last) {
    advance(last, [](int) {});
  }

  const Cells<T>& cells() const { return cells_; }

 private:
  Sizes<T> sizes_;
  int rows_, columns_;
  const S* source_ = nullptr;
  ptrdiff_t row_ = 0, column_ = 0;
  int next_ = 0;
  Cells<T> cells_;
};

// Keys (or values) of a segment with channels outside: [row][channel][width]. Column c of a coarse grid is repeated
// for the queries above it, so that a vector of neighbouring queries always loads neighbouring columns.
template <class S, class T>
class KeyRows {
 public:
  KeyRows(Arena& arena, const Sizes<T>& sizes, const Segment& segment, int ring, bool keep_cells)
      : sizes_(sizes),
        segment_(segment),
        ring_(std::max(1, std::min(ring, segment.rows))),
        first_(segment.window.left * segment.column_ratio),
        width_(spread<T>(sizes.wide_columns + (segment.slot_columns() - 1) * segment.column_ratio)),
        cells_(arena, sizes, segment.rows, segment.columns, keep_cells ? ring : 1) {
    // Shifted loads may read one vector past the last row.
    if (segment.rows) transposed_ = arena.take<T>(ring_ * sizes.channels * width_ + 2 * Simd<T>::LANES);
  }

  void start(const View& view, int64_t batch, int64_t head, int first_row) {
    cells_.start(view, batch, head, first_row);
  }
  void advance(int last) {
    cells_.advance(last, [this](int row) {
      transpose_cells(cells_.cells().at(row, 0), sizes_.wide_channels, segment_.columns, sizes_, first_,
                      segment_.column_ratio, width_, transposed_ + (row % ring_) * sizes_.channels * width_);
    });
  }

  const T* transposed(int row) const { return transposed_ + (row % ring_) * sizes_.channels * width_; }
  ptrdiff_t width() const { return width_; }
  const Cells<T>& cells() const { return cells_.cells(); }

 private:
  Sizes<T> sizes_;
  Segment segment_;
  int ring_, first_;
  ptrdiff_t width_;
  CellRows<S, T> cells_;
  T* transposed_ = nullptr;
};

// Up to SCORE_ROWS query rows, transposed in tiles of LANES queries: [tile][row][channel][lane].
template <class T>
class QueryTiles {
 public:
  QueryTiles(Arena& arena, const Sizes<T>& sizes) : sizes_(sizes) {
    tiles_ = arena.take<T>(static_cast<ptrdiff_t>(SCORE_ROWS) * sizes.channels * sizes.wide_columns);
  }
  void fill(const Cells<T>& cells, int y, int rows, T factor) {
    constexpr int L = Simd<T>::LANES;
    for (int r = 0; r < rows; ++r)
      for (int x = 0; x < sizes_.columns; x += L)
        transpose_block(cells.at(y + r, x), cells.column, std::min(L, sizes_.columns - x), sizes_, factor, L,
                        tiles_ + x * SCORE_ROWS * sizes_.channels + r * row_stride());
  }
  // The tile of columns x .. x + LANES - 1; channels are LANES apart.
  const T* tile(int r, int x) const { return tiles_ + x * SCORE_ROWS * sizes_.channels + r * row_stride(); }
  ptrdiff_t row_stride() const { return static_cast<ptrdiff_t>(sizes_.channels) * Simd<T>::LANES; }

 private:
  Sizes<T> sizes_;
  T* tiles_;
};

// Products of the query rows y .. y + rows - 1 with the keys of their windows. Row r and slot s go to
// to + r * to_row + s * slot. Keys outside the grid by column get `outside`; by row, their slots are not written.
template <class S, class T>
void score_segment(const Sizes<T>& sizes, const Segment& segment, const QueryTiles<T>& queries,
                   const KeyRows<S, T>& keys, int y, int rows, T* to, ptrdiff_t to_row, ptrdiff_t slot, T outside) {
  using V = Simd<T>;
  constexpr int L = V::LANES;
  const int low = segment.low_row(y / segment.row_ratio), high = segment.high_row((y + rows - 1) / segment.row_ratio);
  const int step = segment.column_ratio, left = segment.window.left, across = segment.slot_columns();
  const typename V::Integers lane = V::lane_numbers();
  for (int x = 0; x < sizes.columns; x += L) {
    for (int key_row = low; key_row <= high; ++key_row) {
      int seen[SCORE_ROWS];
      T* target[2];
      for (int r = 0; r < rows; ++r) {
        const int u = key_row - (y + r) / segment.row_ratio;
        seen[r] = u < -segment.window.top || u > segment.window.bottom ? 0 : segment.seen_columns(u);
        target[r] = to + r * to_row + (segment.first_slot + (u + segment.window.top) * across) * slot + x;
      }
      const T* key = keys.transposed(key_row) + x;
      const bool together = rows == 2 && seen[0] == seen[rows - 1];
      for (int r = 0; r < (together ? 1 : rows); ++r) {
        for (int c = 0; c < seen[r]; c += SCORE_COLUMNS) {
          const int now = std::min(SCORE_COLUMNS, seen[r] - c);
          T* tiles[2] = {target[r] + c * slot, target[rows - 1] + c * slot};
          if (SCORE_ROWS == 2 && together)
            score_tile<T, SCORE_ROWS>(now, queries.tile(0, x), queries.row_stride(), key + c * step, keys.width(), step,
                                      sizes.channels, tiles, slot);
          else
            score_tile<T, 1>(now, queries.tile(r, x), 0, key + c * step, keys.width(), step, sizes.channels, tiles, slot);
          for (int i = 0; i < now; ++i) {
            const int shift = (c + i - left) * step;
            if (x + shift >= 0 && x + L - 1 + shift < sizes.columns) continue;
            const typename V::Integers column = lane + (x + shift);
            const auto inside = (column >= 0) & (column < sizes.columns);
            for (int t = 0; t < (together ? 2 : 1); ++t) {
              T* at = tiles[t] + i * slot;
              V::store(at, inside ? V::load(at) : V::fill(outside));
            }
          }
        }
      }
    }
  }
}

template <class T>
void score_all_tokens(const Sizes<T>& sizes, const QueryTiles<T>& queries, const Cells<T>& tokens, int rows, T* to,
                      ptrdiff_t to_row, ptrdiff_t slot) {
  constexpr int BLOCK = 8;
  for (int r = 0; r < rows; ++r)
    for (int x = 0; x < sizes.columns; x += Simd<T>::LANES) {
      int t = 0;
      for (; t + BLOCK <= sizes.tokens; t += BLOCK)
        score_tokens<T, BLOCK>(queries.tile(r, x), tokens.at(0, t), tokens.column, sizes.channels,
                               to + r * to_row + t * slot + x, slot);
      for (; t < sizes.tokens; ++t)
        score_tokens<T, 1>(queries.tile(r, x), tokens.at(0, t), tokens.column, sizes.channels,
                           to + r * to_row + t * slot + x, slot);
    }
}

// to[x][:] += sum over the window of query row y of weight * value. Slot s of the row's weights lies at
// weights + s * slot + x; `to` is [columns][wide channels].
template <class T>
void sum_segment(const Sizes<T>& sizes, const Segment& segment, const Cells<T>& values, const T* weights,
                 ptrdiff_t slot, int y, T* to) {
  const int centre = y / segment.row_ratio, step = segment.column_ratio, left = segment.window.left;
  const int across = segment.slot_columns(), high = segment.high_row(centre);
  for (int first = segment.low_row(centre); first <= high;) {
    // A stretch of key rows with equal windows that does not wrap around the ring.
    const int seen = segment.seen_columns(first - centre);
    int last = first;
    while (last < high && (last + 1) % values.ring != 0 && segment.seen_columns(last + 1 - centre) == seen) ++last;
    const T* base = weights + (segment.first_slot + (first - centre + segment.window.top) * across) * slot;
    for (int phase = 0; phase < step; ++phase) {
      for (int m = 0; m < segment.columns; m += SUM_TARGETS) {
        const int targets = std::min(SUM_TARGETS, segment.columns - m);
        Sum<T> sum;
        sum.target = to + (static_cast<ptrdiff_t>(m) * step + phase) * sizes.wide_channels;
        sum.target_stride = static_cast<ptrdiff_t>(step) * sizes.wide_channels;
        sum.source = values.at(first, 0) + (m - left) * values.column;
        sum.source_row = values.row;
        sum.source_stride = values.column;
        sum.weights = base + m * step + phase;
        sum.weight_row = across * slot;
        sum.weight_source = slot;
        sum.weight_target = step - slot;
        sum.rows = last - first + 1;
        sum.begin = std::max(0, left - m);
        sum.end = std::min(seen + targets - 1, segment.columns + left - m);
        sum.band = seen;
        weighted_sum(sum, targets, sizes.channel_vectors);
      }
    }
    first = last + 1;
  }
}

template <class T>
void sum_tokens(const Sizes<T>& sizes, const Cells<T>& values, const T* weights, ptrdiff_t slot, T* to) {
  for (int x = 0; x < sizes.columns; x += SUM_TARGETS) {
    const int targets = std::min(SUM_TARGETS, sizes.columns - x);
    weighted_sum(Sum<T>{to + static_cast<ptrdiff_t>(x) * sizes.wide_channels, sizes.wide_channels, values.at(0, 0), 0,
                        values.column, weights + x, 0, slot, 1, 1, 0, sizes.tokens, 0},
                 targets, sizes.channel_vectors);
  }
}

// Call visit(first slot, end slot) for the slots of query row y that hold scores: tokens, cross, local.
template <class F>
void for_slots_of_row(const Segment& segment, int y, F visit) {
  const int centre = y / segment.row_ratio, across = segment.slot_columns();
  const int low = segment.low_row(centre) - centre, high = segment.high_row(centre) - centre;
  if (low > high) return;
  visit(segment.first_slot + (low + segment.window.top) * across,
        segment.first_slot + (high + segment.window.top) * across + segment.seen_columns(high));
}

// Factors of dropout for the lanes x .. x + LANES - 1 of one slot: 0 or 1 / (1 - p).
template <class T>
typename Simd<T>::Vector kept(const uint32_t* query_bits, int slot, uint32_t threshold, T factor) {
  typename Simd<T>::Vector result;
  for (int i = 0; i < Simd<T>::LANES; ++i) result[i] = dropout_bits(query_bits[i], slot) < threshold ? T(0) : factor;
  return result;
}

// Store a row of cells in the tensor's type, each times its own factor (or all times `factor`).
template <class S, class T>
void store_cells(const T* from, int cells, const Sizes<T>& sizes, const T* factors, T factor, S* to,
                 ptrdiff_t stride) {
  for (int c = 0; c < cells; ++c) {
    const T* cell = from + static_cast<ptrdiff_t>(c) * sizes.wide_channels;
    const T times = factors ? factors[c] : factor;
    for (int d = 0; d < sizes.channels; ++d) narrow(cell[d] * times, to[c * stride + d]);
  }
}

}  // namespace local_attention
