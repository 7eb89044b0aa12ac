// What the tensor-core kernels share: fetching cells into shared memory, patches, and the three kinds of keys.
//
// Letters: D channels of a head. A lane's share of a 16 x 16 tile of scores is float[2][4], see tile.h.
#pragma once

#include "../problem.h"
#include "../tile.h"
#include "plain.cuh"

namespace local_attention {
namespace tensor_core {

using tile::GROUP;
using tile::PATCH;
using tile::STRIP;
using tile::StripPlan;

// Bytes of a cell's channels.
template <int D>
constexpr uint32_t CELL = 2 * D;

// A tensor as one (batch, head) sees it; steps in bytes.
struct Plane {
  char* data;
  int64_t row, column;

  LOCAL_ATTENTION_DEVICE Plane(const View& view, int batch, int head)
      : data(static_cast<char*>(view.data)), row(2 * view.row), column(2 * view.column) {
    if (data) data += 2 * (batch * view.batch + head * view.head);
  }
  LOCAL_ATTENTION_DEVICE char* at(int y, int x) const { return data + y * row + x * column; }
};

// Which part of the problem a block works on. Every look reads shared memory again, which costs less than the
// registers to remember it through the loops.
struct Block : tile::BlockPlace {
  LOCAL_ATTENTION_DEVICE Block(const StripPlan& plan) {
    const volatile int* place = reinterpret_cast<const volatile int*>(shared_memory() + plan.block);
    batch = place[0];
    head = place[1];
    left = place[2];
    first_row = place[3];
    end_row = place[4];
  }
  // To be followed by a block barrier.
  static LOCAL_ATTENTION_DEVICE void write(const Problem& p, const StripPlan& plan) {
    if (thread_index() != 0) return;
    volatile int* place = reinterpret_cast<volatile int*>(shared_memory() + plan.block);
    uint32_t n = static_cast<uint32_t>(block_index());  // launch() starts fewer than 2^31
    const uint32_t strips = static_cast<uint32_t>(plan.strips), bands = static_cast<uint32_t>(plan.bands);
    place[2] = static_cast<int>(n % strips) * STRIP;
    n /= strips;
    const int first = static_cast<int>(n % bands) * plan.band_rows;
    place[3] = first;
    place[4] = lowest(first + plan.band_rows, static_cast<int>(p.rows));
    n /= bands;
    place[1] = static_cast<int>(n % static_cast<uint32_t>(p.heads));
    place[0] = static_cast<int>(n / static_cast<uint32_t>(p.heads));
  }
};

// One warp starts to copy the cells (y, x), (y, x + 1) ... of two tensors, zeros where outside the grid. Cell i goes to
// target + i * CELL<D>, the second tensor's `second` bytes further; `number`: of the first cell, see tile::spread.
template <int D>
LOCAL_ATTENTION_DEVICE void fetch_row(const Plane& a, const Plane& b, int y, int x, int cells, int rows, int columns,
                                      uint32_t target, uint32_t second, int number) {
  constexpr int CHUNKS = D / 8, CELLS_AT_ONCE = 32 / CHUNKS;
  const int lane = lane_index_anew();
  const uint32_t chunk = static_cast<uint32_t>(lane % CHUNKS) << 4;
  const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(rows);
  const int first = lane / CHUNKS, end = row_inside ? columns : 0;
  // Addresses outside the grid are never read from. They are aligned all the same: a step is 0 where there is only
  // one row or column.
  const char *from_a = a.at(y, x + first) + chunk, *from_b = b.at(y, x + first) + chunk;
  const int64_t step_a = CELLS_AT_ONCE * a.column, step_b = CELLS_AT_ONCE * b.column;
  uint32_t to = target + static_cast<uint32_t>(first) * CELL<D>;
  LOCAL_ATTENTION_NO_UNROLL for (int i = first; i < cells; i += CELLS_AT_ONCE) {
    const bool inside = static_cast<unsigned>(x + i) < static_cast<unsigned>(end);
    const uint32_t place = to + (chunk ^ tile::spread<D>(number + i));
    copy_async(place, from_a, inside);
    copy_async(place + second, from_b, inside);
    from_a += step_a;
    from_b += step_b;
    to += CELLS_AT_ONCE * CELL<D>;
  }
}

// The rows of a strip that partners lie in, as a ring: row y of the grid is in slot row (y - first_row + start).
struct Ring {
  int start;  // slot row of the uppermost row of this step's halo

  LOCAL_ATTENTION_DEVICE Ring() : start(0) {}
  static LOCAL_ATTENTION_DEVICE int wrap(int slot_row, int rows) {
    return slot_row >= rows ? slot_row - rows : slot_row;
  }

  // Starts to fetch `count` rows from `skip` rows below the uppermost of the step at y0.
  template <int D>
  LOCAL_ATTENTION_DEVICE void fetch(const Problem& p, const StripPlan& plan, const Block& block, const Plane& a,
                                    const Plane& b, uint32_t base, int y0, int skip, int count,
                                    const char* statistics) const {
    const int left = block.left - plan.halo_left;
    LOCAL_ATTENTION_NO_UNROLL for (int r = warp_index_anew(); r < count; r += plan.warps) {
      const int y = y0 - plan.halo_top + skip + r;
      const int slot_row = wrap(wrap(start + skip, plan.ring_rows) + r, plan.ring_rows);
      const uint32_t slot = static_cast<uint32_t>(slot_row * plan.ring_columns);
      fetch_row<D>(a, b, y, left, plan.ring_columns, static_cast<int>(p.rows), static_cast<int>(p.columns),
                   base + slot * CELL<D>, plan.ring_second, tile::cell_number(y, left, plan.halo_columns));
      if (!statistics) continue;
      const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.rows);
      LOCAL_ATTENTION_NO_UNROLL for (int i = lane_index(); i < plan.ring_columns; i += 32) {
        const bool inside = row_inside && static_cast<unsigned>(left + i) < static_cast<unsigned>(p.columns);
        copy_async_8(base + plan.statistics + (slot + i) * 8,
                     inside ? statistics + (y * p.columns + left + i) * 8 : statistics, inside);
      }
    }
  }
  LOCAL_ATTENTION_DEVICE void advance(const StripPlan& plan) { start = wrap(start + plan.step, plan.ring_rows); }
};

// Slots and visibility of the partners of a patch, the same for every patch of the strip.
template <typename Visible>
LOCAL_ATTENTION_DEVICE void write_tables(const StripPlan& plan, const Visible& visible) {
  uint16_t* slots = reinterpret_cast<uint16_t*>(shared_memory() + plan.slots);
  uint8_t* bits = shared_memory() + plan.bits;
  const int threads = block_threads();
  LOCAL_ATTENTION_NO_UNROLL for (int n = thread_index(); n < plan.halo_groups * GROUP; n += threads)
    slots[n] = static_cast<uint16_t>(
        n < plan.halo_count ? n / plan.halo_columns * plan.ring_columns + n % plan.halo_columns : 0);
  LOCAL_ATTENTION_NO_UNROLL for (int n = thread_index(); n < plan.halo_groups * 32; n += threads)
    bits[n] = static_cast<uint8_t>(
        tile::element_bits(n % 32, n / 32, plan.halo_columns, plan.halo_count, visible));
}

// A warp's 4x4 cells. This lane holds elements of two of the 16 rows: h = 0 and 1.
struct Patch {
  int top, left;
  int y[2], x[2];
  bool inside[2];

  LOCAL_ATTENTION_DEVICE Patch(int patch_top, int patch_left, int end_row, int end_column)
      : top(patch_top), left(patch_left) {
    const int lane = lane_index_anew();
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
      const int i = lane / 4 + 8 * h;
      y[h] = top + i / PATCH;
      x[h] = left + i % PATCH;
      inside[h] = y[h] < end_row && x[h] < end_column;
    }
  }
};

// Rows of a matrix A, straight from global memory; zeros outside. `flip`: bits to turn in every pair of numbers.
template <int D, typename Rows>
LOCAL_ATTENTION_DEVICE void load_patch(Rows& rows, const Plane& plane, const Patch& patch, uint32_t flip) {
  uint32_t a[D / 16][4];
  LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
    const char* row = patch.inside[h] ? plane.at(patch.y[h], patch.x[h]) + lane_index() % 4 * 4 : nullptr;
    LOCAL_ATTENTION_UNROLL for (int k = 0; k < D / 16; ++k) {
      LOCAL_ATTENTION_UNROLL for (int half = 0; half < 2; ++half)
        a[k][h + 2 * half] = row ? *reinterpret_cast<const uint32_t*>(row + k * 32 + half * 16) ^ flip : 0;
    }
  }
  rows.hold(a);
}

struct alignas(8) Pair {
  uint32_t first, second;
};

// Stores accumulated rows, times a factor for each, rounded once. Neighbouring lanes trade halves so that each stores
// four channels at a time, which fills whole sectors of memory.
template <typename T, int D>
LOCAL_ATTENTION_DEVICE void store_patch(const Plane& plane, const Patch& patch, const float (&sums)[D / 8][4],
                                        const float (&factor)[2]) {
  const bool odd = lane_index() & 1;
  LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
    char* row = plane.at(patch.y[h], patch.x[h]) + lane_index() % 4 / 2 * 8 + (odd ? 16 : 0);
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < D / 8; t += 2) {
      const uint32_t even_tile = pack<T>(sums[t][2 * h] * factor[h], sums[t][2 * h + 1] * factor[h]);
      const uint32_t odd_tile = pack<T>(sums[t + 1][2 * h] * factor[h], sums[t + 1][2 * h + 1] * factor[h]);
      const uint32_t other = shuffle_xor(odd ? even_tile : odd_tile, 1);
      if (patch.inside[h])
        *reinterpret_cast<Pair*>(row + t * 16) = odd ? Pair{other, odd_tile} : Pair{even_tile, other};
    }
  }
}

// --- the kinds of partners -------------------------------------------------------------------------------------
//
// row(g): the address that this lane gives to matrix loads of group g, for channels 0..15; ^ (k << 5) for 16 k and on.
// visible(g): bits of this lane's elements, see tile::element_bits.
// bias(g, t, e): of an element, in units of log 2.
// slot(g, t, e): what dropout calls the element.

// Partners in the ring: local keys of a query patch, or queries of a key patch.
template <int D, bool MIRRORED>
struct RingPartners {
  static constexpr bool BIASED = false, MASKED = true;
  const StripPlan& plan;
  const Window& window;
  const uint16_t* slots;
  const uint8_t* bits;
  uint32_t base, start, ring_bytes, mix;
  int top, left, rows, columns, first, end, first_slot;
  bool whole;

  // `patch_row`, `patch_column`: of the patch in its step.
  LOCAL_ATTENTION_DEVICE RingPartners(const Problem& p, const StripPlan& strip_plan, const Ring& ring, uint32_t shared,
                                      const Patch& patch, int patch_row, int patch_column)
      : plan(strip_plan), window(p.window) {
    const int lane = lane_index();
    slots = reinterpret_cast<const uint16_t*>(shared_memory() + plan.slots) + tile::loaded_partner(lane);
    bits = shared_memory() + plan.bits + lane;
    base = shared;
    ring_bytes = static_cast<uint32_t>(plan.ring_rows * plan.ring_columns) * CELL<D>;
    const int slot_row = Ring::wrap(ring.start + patch_row, plan.ring_rows);
    start = static_cast<uint32_t>(slot_row * plan.ring_columns + patch_column) * CELL<D>;
    top = patch.top - plan.halo_top;
    left = patch.left - plan.halo_left;
    rows = static_cast<int>(p.rows);
    columns = static_cast<int>(p.columns);
    const int number = tile::cell_number(top, left, plan.halo_columns) + lane % 8;
    mix = static_cast<uint32_t>(tile::loaded_half(lane)) << 4 ^ tile::spread<D>(number);
    const int halo_rows = plan.ring_needed - plan.step + PATCH;
    whole = top >= 0 && left >= 0 && top + halo_rows <= rows && left + plan.halo_columns <= columns;
    first = highest(-top, 0) * plan.halo_columns / GROUP;
    end = lowest((lowest(halo_rows, rows - top) * plan.halo_columns + GROUP - 1) / GROUP, plan.halo_groups);
    first_slot = static_cast<int>(p.tokens) + (p.cross_key.data ? window_slots(p.cross_window) : 0);
  }
  LOCAL_ATTENTION_DEVICE uint32_t row(int g) const {
    const uint32_t at = start + slots[g * GROUP] * CELL<D>, wrapped = at - ring_bytes;
    return (base + (at < wrapped ? at : wrapped)) ^ mix;
  }
  // The ring's cells that hold the partners of a lane's two columns of tile t.
  LOCAL_ATTENTION_DEVICE void cells(int g, int t, uint32_t (&numbers)[2]) const {
    const uint16_t* slots_of_all = slots - tile::loaded_partner(lane_index());
    const int first_partner = g * GROUP + tile::element_column(lane_index(), t, 0);
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(slots_of_all + first_partner);
    LOCAL_ATTENTION_UNROLL for (int column = 0; column < 2; ++column) {
      const uint32_t at = start + (column ? pair >> 16 : pair & 0xffff) * CELL<D>, wrapped = at - ring_bytes;
      numbers[column] = (at < wrapped ? at : wrapped) / CELL<D>;
    }
  }
  // Row and column of an element's partner in the halo.
  LOCAL_ATTENTION_DEVICE void place(int g, int t, int column, int& row, int& halo_column) const {
    const uint16_t* slots_of_all = slots - tile::loaded_partner(lane_index());
    const int slot = slots_of_all[g * GROUP + tile::element_column(lane_index(), t, column)];
    row = tile::divide_by(slot, plan.column_reciprocal);
    halo_column = slot - row * plan.ring_columns;
  }
  LOCAL_ATTENTION_DEVICE uint32_t visible(int g) const {
    uint32_t seen = bits[g * 32];
    if (!whole) clip(g, seen);
    return seen;
  }
  // The same for several groups, with one branch.
  template <int COUNT>
  LOCAL_ATTENTION_DEVICE void visible(int g, uint32_t (&seen)[COUNT]) const {
    LOCAL_ATTENTION_UNROLL for (int j = 0; j < COUNT; ++j) seen[j] = bits[(g + j) * 32];
    if (whole) return;
    LOCAL_ATTENTION_UNROLL for (int j = 0; j < COUNT; ++j) clip(g + j, seen[j]);
  }
  // Hides what lies outside the grid.
  LOCAL_ATTENTION_DEVICE void clip(int g, uint32_t& seen) const {
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2; ++t) {
      LOCAL_ATTENTION_UNROLL for (int column = 0; column < 2; ++column) {
        int r, c;
        place(g, t, column, r, c);
        if (static_cast<unsigned>(top + r) >= static_cast<unsigned>(rows) ||
            static_cast<unsigned>(left + c) >= static_cast<unsigned>(columns))
          seen &= ~tile::column_bits(t, column);
      }
    }
  }
  LOCAL_ATTENTION_DEVICE float bias(int, int, int) const { return 0; }
  LOCAL_ATTENTION_DEVICE int slot(int g, int t, int e) const {
    int r, c;
    place(g, t, e % 2, r, c);
    const int i = tile::element_row(lane_index(), e);
    if (MIRRORED)
      return first_slot + window_slot(window, i / PATCH + window.bottom - r, i % PATCH + window.right - c);
    return first_slot + window_slot(window, r - window.top - i / PATCH, c - window.left - i % PATCH);
  }
  // The number of an element's query, for key patches.
  LOCAL_ATTENTION_DEVICE int query(int g, int t, int e) const {
    int r, c;
    place(g, t, e % 2, r, c);
    return (top + r) * columns + left + c;
  }
};

// Global tokens: shared memory holds all of them.
template <int D>
struct TokenKeys {
  static constexpr bool BIASED = true, MASKED = false;
  uint32_t start;
  const float* biases;
  int first, end;

  LOCAL_ATTENTION_DEVICE TokenKeys(const StripPlan& plan, uint32_t shared) {
    const int lane = lane_index(), partner = tile::loaded_partner(lane);
    start = (shared + plan.tokens + static_cast<uint32_t>(partner) * CELL<D>) ^
            (static_cast<uint32_t>(tile::loaded_half(lane)) << 4) ^ tile::spread<D>(partner);
    biases = reinterpret_cast<const float*>(shared_memory() + plan.token_bias) + lane % 4 * 2;
    first = 0;
    end = plan.token_rows / GROUP;
  }
  // Starts to fetch all tokens, and writes their biases: -infinity behind the last one.
  static LOCAL_ATTENTION_DEVICE void fetch(const Problem& p, const StripPlan& plan, const Block& block,
                                           uint32_t shared) {
    if (plan.token_rows == 0) return;
    const Plane key(p.token_key, block.batch, block.head), value(p.token_value, block.batch, block.head);
    LOCAL_ATTENTION_NO_UNROLL for (int t = warp_index() * 8; t < plan.token_rows; t += plan.warps * 8)
      fetch_row<D>(key, value, 0, t, 8, 1, static_cast<int>(p.tokens),
                   shared + plan.tokens + static_cast<uint32_t>(t) * CELL<D>, plan.token_second, t);
    const float* bias = static_cast<const float*>(p.token_bias);
    LOCAL_ATTENTION_NO_UNROLL for (int t = thread_index(); t < plan.token_rows; t += block_threads()) {
      float value_of_t = minus_infinity();
      if (t < p.tokens) value_of_t = bias ? bias[block.batch * p.tokens + t] * LOG2_E : 0;
      reinterpret_cast<float*>(shared_memory() + plan.token_bias)[t] = value_of_t;
    }
  }
  LOCAL_ATTENTION_DEVICE uint32_t row(int g) const { return start + static_cast<uint32_t>(g) * (GROUP * CELL<D>); }
  LOCAL_ATTENTION_DEVICE uint32_t visible(int) const { return 255; }
  template <int COUNT>
  LOCAL_ATTENTION_DEVICE void visible(int, uint32_t (&seen)[COUNT]) const {
    LOCAL_ATTENTION_UNROLL for (int j = 0; j < COUNT; ++j) seen[j] = 255;
  }
  LOCAL_ATTENTION_DEVICE float bias(int g, int t, int e) const { return biases[g * GROUP + t * 8 + e % 2]; }
  LOCAL_ATTENTION_DEVICE int slot(int g, int t, int e) const {
    return g * GROUP + tile::element_column(lane_index(), t, e);
  }
};

// Coarse keys of a query patch, from the tile of coarse cells that the step needs.
template <int D>
struct CrossKeys {
  static constexpr bool BIASED = true, MASKED = true;
  static constexpr uint32_t OUTSIDE = 0x40000000;
  const Pair* table;  // of every key: address; row << 16 | column in the patch's rectangle, or OUTSIDE
  uint32_t base, half;
  const Window& window;
  int first, end, first_slot;
  uint32_t corner[2];  // where the windows of this lane's queries begin, like the table's places
  float bias_of_all;

  static LOCAL_ATTENTION_DEVICE int row_ratio(const Problem& p) {
    return static_cast<int>(p.rows) / static_cast<int>(p.cross_rows);
  }
  static LOCAL_ATTENTION_DEVICE int column_ratio(const Problem& p) {
    return static_cast<int>(p.columns) / static_cast<int>(p.cross_columns);
  }
  // Two tiles take turns where one is fetched while the other is used.
  static LOCAL_ATTENTION_DEVICE uint32_t tile_at(const StripPlan& plan, int y0) {
    return plan.tiles + (plan.ahead ? y0 / plan.step & 1 : 0) * plan.tile_bytes;
  }
  static LOCAL_ATTENTION_DEVICE void fetch(const Problem& p, const StripPlan& plan, const Block& block,
                                           uint32_t shared, int y0) {
    if (plan.tile_rows == 0) return;
    const Plane key(p.cross_key, block.batch, block.head), value(p.cross_value, block.batch, block.head);
    const int top = y0 / row_ratio(p) - p.cross_window.top, left = block.left / column_ratio(p) - p.cross_window.left;
    LOCAL_ATTENTION_NO_UNROLL for (int r = warp_index_anew(); r < plan.tile_rows; r += plan.warps)
      fetch_row<D>(key, value, top + r, left, plan.tile_columns, static_cast<int>(p.cross_rows),
                   static_cast<int>(p.cross_columns),
                   shared + tile_at(plan, y0) + static_cast<uint32_t>(r * plan.tile_columns) * CELL<D>,
                   plan.tile_second, tile::cell_number(r, 0, plan.tile_halo));
  }
  LOCAL_ATTENTION_DEVICE CrossKeys(const Problem& p, const StripPlan& plan, const Block& block, uint32_t shared,
                                   const Patch& patch, int y0)
      : window(p.cross_window) {
    const int a = row_ratio(p), b = column_ratio(p);
    const int top = patch.top / a, left = patch.left / b;  // centre of the first query
    const int last_y = lowest(patch.top + PATCH, static_cast<int>(p.rows)) - 1;
    const int last_x = lowest(patch.left + PATCH, static_cast<int>(p.columns)) - 1;
    const int rows = last_y / a - top + window_rows(window), columns = last_x / b - left + window_columns(window);
    const int count = rows * columns;
    first = 0;
    end = (count + GROUP - 1) / GROUP;
    first_slot = static_cast<int>(p.tokens);
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h)
      corner[h] = static_cast<uint32_t>((patch.y[h] / a - top) << 16 | (patch.x[h] / b - left));
    bias_of_all = p.cross_bias ? *static_cast<const float*>(p.cross_bias) * LOG2_E : 0;
    base = shared + tile_at(plan, y0);
    half = static_cast<uint32_t>(tile::loaded_half(lane_index())) << 4;
    Pair* own = reinterpret_cast<Pair*>(shared_memory() + plan.tables + warp_index() * plan.table_bytes);
    table = own;
    const int tile_row = top - y0 / a, tile_column = left - block.left / b;
    const int grid_top = top - p.cross_window.top, grid_left = left - p.cross_window.left;
    LOCAL_ATTENTION_NO_UNROLL for (int n = lane_index(); n < end * GROUP; n += 32) {
      const int m = tile::real_partner(n, count), r = m / columns, c = m - r * columns;
      const bool inside = n < count && static_cast<unsigned>(grid_top + r) < static_cast<unsigned>(p.cross_rows) &&
                          static_cast<unsigned>(grid_left + c) < static_cast<unsigned>(p.cross_columns);
      const int cell_row = tile_row + r, cell_column = tile_column + c;
      const uint32_t at = static_cast<uint32_t>(cell_row * plan.tile_columns + cell_column) * CELL<D>;
      own[n] = {at + tile::spread<D>(tile::cell_number(cell_row, cell_column, plan.tile_halo)),
                inside ? static_cast<uint32_t>(r << 16 | c) : OUTSIDE};
    }
    warp_barrier();
  }
  LOCAL_ATTENTION_DEVICE uint32_t row(int g) const {
    return (base + table[g * GROUP + tile::loaded_partner(lane_index())].first) ^ half;
  }
  // Where a key lies in the window of an element's query: row << 16 | column. A column before the window borrows from
  // the row, but is itself then too large to be inside.
  LOCAL_ATTENTION_DEVICE uint32_t place(int g, int t, int e) const {
    return table[g * GROUP + tile::element_column(lane_index(), t, e)].second - corner[e / 2];
  }
  LOCAL_ATTENTION_DEVICE uint32_t visible(int g) const {
    uint32_t seen = 0;
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2; ++t) {
      LOCAL_ATTENTION_UNROLL for (int e = 0; e < 4; ++e) {
        const uint32_t at = place(g, t, e);
        if (at >> 16 < static_cast<uint32_t>(window_rows(window)) &&
            (at & 0xffff) < static_cast<uint32_t>(window_columns(window)))
          seen |= 1u << (4 * t + e);
      }
    }
    return seen;
  }
  template <int COUNT>
  LOCAL_ATTENTION_DEVICE void visible(int g, uint32_t (&seen)[COUNT]) const {
    LOCAL_ATTENTION_UNROLL for (int j = 0; j < COUNT; ++j) seen[j] = visible(g + j);
  }
  LOCAL_ATTENTION_DEVICE float bias(int, int, int) const { return bias_of_all; }
  LOCAL_ATTENTION_DEVICE int slot(int g, int t, int e) const {
    const uint32_t at = place(g, t, e);
    return first_slot + static_cast<int>(at >> 16) * window_columns(window) + static_cast<int>(at & 0xffff);
  }
};

// --- what both passes need to know of the problem --------------------------------------------------------------

// Scores are in units of log 2, so their factor is |scale| * log2(e). A negative scale turns the signs of the queries
// (or keys) instead, so that larger products always mean larger scores.
struct Scale {
  float factor;        // of products
  uint32_t sign_flip;  // bits to turn in every pair of numbers of the rows of A
};

// Rows of A from scores in the layout of C.
template <typename T>
LOCAL_ATTENTION_DEVICE void pack_scores(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack<T>(low[0], low[1]);
  a[1] = pack<T>(low[2], low[3]);
  a[2] = pack<T>(high[0], high[1]);
  a[3] = pack<T>(high[2], high[3]);
}

template <int N>
LOCAL_ATTENTION_DEVICE void clear(float (&tiles)[N][4]) {
  LOCAL_ATTENTION_UNROLL for (int t = 0; t < N; ++t) {
    LOCAL_ATTENTION_UNROLL for (int e = 0; e < 4; ++e) tiles[t][e] = 0;
  }
}

struct alignas(16) Quad {
  uint32_t parts[4];
};

// The 16 x D rows of A that a warp keeps, in registers.
template <int D>
struct HeldRows {
  uint32_t parts[D / 16][4];

  LOCAL_ATTENTION_DEVICE void hold(const uint32_t (&a)[D / 16][4]) {
    LOCAL_ATTENTION_UNROLL for (int k = 0; k < D / 16; ++k) {
      LOCAL_ATTENTION_UNROLL for (int i = 0; i < 4; ++i) parts[k][i] = a[k][i];
    }
  }
  LOCAL_ATTENTION_DEVICE Quad at(int k) const { return {{parts[k][0], parts[k][1], parts[k][2], parts[k][3]}}; }
};

// The same, in shared memory, every lane its own part: for kernels that have no registers left.
constexpr int PARKED_BYTES = 32 * 16;  // of 16 channels
template <int D>
struct ParkedRows {
  Quad* parts;

  LOCAL_ATTENTION_DEVICE void hold(const uint32_t (&a)[D / 16][4]) {
    LOCAL_ATTENTION_UNROLL for (int k = 0; k < D / 16; ++k) parts[k * 32] = {{a[k][0], a[k][1], a[k][2], a[k][3]}};
  }
  LOCAL_ATTENTION_DEVICE Quad at(int k) const { return parts[k * 32]; }
};

// tiles (16 x 16) += A (16 x D) times the transpose of a group's 16 cells.
template <typename T, int D, typename Rows>
LOCAL_ATTENTION_DEVICE void multiply_by_cells(float (&low)[4], float (&high)[4], const Rows& a, uint32_t row) {
  LOCAL_ATTENTION_UNROLL for (uint32_t k = 0; k < D / 16; ++k) {
    const Quad part = a.at(static_cast<int>(k));
    uint32_t b[4];
    load_matrices(b, row ^ (k << 5));
    matrix_product<T>(low, part.parts, b[0], b[1]);
    matrix_product<T>(high, part.parts, b[2], b[3]);
  }
}

// From the address for matrices as stored, that for transposed ones.
LOCAL_ATTENTION_DEVICE uint32_t transposed_row(uint32_t row) {
  return shuffle(row, tile::transposed_source(lane_index()));
}

// sums (16 x D) += A (16 x 16) times a group's 16 cells; `row`: from transposed_row.
template <typename T, int D>
LOCAL_ATTENTION_DEVICE void add_cells(float (&sums)[D / 8][4], const uint32_t (&a)[4], uint32_t row) {
  LOCAL_ATTENTION_UNROLL for (uint32_t k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    load_matrices_transposed(b, row ^ (k << 5));
    matrix_product<T>(sums[2 * k], a, b[0], b[1]);
    matrix_product<T>(sums[2 * k + 1], a, b[2], b[3]);
  }
}

// Where a warp's patch of this step is. Patch(...) computes each lane's part of it.
struct Step {
  Ring ring;
  int y0;

  static LOCAL_ATTENTION_DEVICE int patch_row() { return warp_index_anew() / 4 * PATCH; }
  static LOCAL_ATTENTION_DEVICE int patch_column() { return warp_index_anew() % 4 * PATCH; }
  LOCAL_ATTENTION_DEVICE Patch patch(const Problem& p, const Block& block) const {
    return Patch(y0 + patch_row(), block.left + patch_column(), block.end_row, static_cast<int>(p.columns));
  }
};

// Walks the steps of a strip. In every step all warps start to fetch (work.fetch), those that have a patch prepare it
// meanwhile, all wait, and those that have a patch work on it.
template <typename Work>
LOCAL_ATTENTION_DEVICE void walk_strip(const Problem& p, const StripPlan& plan, Work& work) {
  Step step;
  step.y0 = Block(plan).first_row;
  while (true) {
    bool busy;
    {
      const Block block(plan);
      const bool first = step.y0 == block.first_row;
      if (first || !plan.ahead) {
        const int fresh = first ? plan.ring_needed : plan.step;
        work.fetch(block, step, plan.ring_needed - fresh, fresh, step.y0);
        copy_commit();
      }
      busy = step.y0 + Step::patch_row() < block.end_row && block.left + Step::patch_column() < p.columns;
    }
    if (busy) work.prepare(step);
    copy_wait<0>();
    block_barrier();
    if (plan.ahead) {
      const Block block(plan);
      if (step.y0 + plan.step < block.end_row) {
        work.fetch(block, step, plan.ring_needed, plan.step, step.y0 + plan.step);
        copy_commit();
      }
    }
    if (busy) work.run(step);
    step.y0 += plan.step;
    if (step.y0 >= Block(plan).end_row) break;
    if (!plan.ahead) block_barrier();
    if (plan.ring_rows) step.ring.advance(plan);
  }
}

// The keys and values that a query strip's step needs: `count` rows of the ring, from `skip` below its uppermost, and
// the coarse tile of the step at tile_y0.
template <int D>
LOCAL_ATTENTION_DEVICE void fetch_keys(const Problem& p, const StripPlan& plan, const Block& block, uint32_t shared,
                                       const Step& step, int skip, int count, int tile_y0) {
  if (plan.ring_rows)
    step.ring.fetch<D>(p, plan, block, Plane(p.key, block.batch, block.head), Plane(p.value, block.batch, block.head),
                       shared, step.y0, skip, count, nullptr);
  CrossKeys<D>::fetch(p, plan, block, shared, tile_y0);
}

// Tables and tokens of a query strip.
template <int D>
LOCAL_ATTENTION_DEVICE void begin_query_strip(const Problem& p, const StripPlan& plan, uint32_t shared) {
  Block::write(p, plan);
  write_tables(plan, [&](int i, int row, int column) { return tile::query_sees(p.window, i, row, column); });
  block_barrier();
  TokenKeys<D>::fetch(p, plan, Block(plan), shared);
}

// Which weights dropout keeps, for the two queries of a lane; NoDropout keeps all and costs nothing.
struct NoDropout {
  static constexpr bool ACTIVE = false;
  LOCAL_ATTENTION_DEVICE NoDropout(const Problem&, const Block&, const Patch&) {}
  LOCAL_ATTENTION_DEVICE float of(int, int) const { return 1; }
};
struct QueryDropout {
  static constexpr bool ACTIVE = true;
  uint32_t threshold, queries[2];
  float factor;

  LOCAL_ATTENTION_DEVICE QueryDropout(const Problem& p, const Block& block, const Patch& patch) {
    const plain::Dropout dropout(p, block.batch, block.head);
    threshold = dropout.threshold;
    factor = static_cast<float>(dropout.factor);
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h)
      queries[h] = dropout_query(dropout.stream, patch.y[h] * static_cast<int>(p.columns) + patch.x[h]);
  }
  LOCAL_ATTENTION_DEVICE float of(int h, int slot) const {
    return dropout_bits(queries[h], slot) < threshold ? 0.0f : factor;
  }
};

}  // namespace tensor_core
}  // namespace local_attention
