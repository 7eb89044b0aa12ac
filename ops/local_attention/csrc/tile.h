// How the tensor-core kernels cut grids into tiles: plain arithmetic, so that tests reach it without a GPU.
//
// A warp owns a patch of 4x4 cells: the 16 rows of its matrix products. Its partners (the keys of a query patch, the
// queries of a key patch) are numbered n = row * columns + column over the smallest rectangle that holds everything
// the patch may meet, its halo, and are taken in groups of 16. A block owns a strip of four patches side by side and
// slides down, keeping the rows that it needs in a ring in shared memory.
#pragma once

#include "window.h"

namespace local_attention {
namespace tile {

constexpr int PATCH = 4;    // rows and columns of a patch
constexpr int GROUP = 16;   // partners of one matrix product
constexpr int STRIP = 16;   // columns of a block
constexpr int LANES = 32;

LOCAL_ATTENTION_BOTH int round_up(int n, int step) { return (n + step - 1) / step * step; }

// --- fragments of m16n8k16 -------------------------------------------------------------------------------------

// Element e (0..3) of lane's share of tile t (0, 1) of a group's 16 x 16 scores.
LOCAL_ATTENTION_BOTH int element_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
LOCAL_ATTENTION_BOTH int element_column(int lane, int t, int e) { return t * 8 + lane % 4 * 2 + e % 2; }

// The partner of its group, and the half of 16 channels, whose address a lane gives to a load of four matrices as
// stored: they are (partners 0-7, low), (0-7, high), (8-15, low), (8-15, high), so that the first two registers make
// one matrix B and the last two another.
LOCAL_ATTENTION_BOTH int loaded_partner(int lane) { return lane % 8 + lane / 16 * 8; }
LOCAL_ATTENTION_BOTH int loaded_half(int lane) { return lane / 8 % 2; }
// For the same when transposed, the second and third matrix change places: a lane takes the address of this one.
LOCAL_ATTENTION_BOTH int transposed_source(int lane) { return lane % 8 + lane / 16 * 8 + lane / 8 % 2 * 16; }

// --- shared memory ---------------------------------------------------------------------------------------------

// A cell's channels lie in one row of 2 * channels bytes, in chunks of 16 bytes. Chunk c is stored at place c ^ spread
// so that the same chunk of eight consecutive partners lies in eight different banks. The result is in bytes.
template <int CHANNELS>
LOCAL_ATTENTION_BOTH uint32_t spread(int number) {
  return static_cast<uint32_t>(CHANNELS == 32 ? number >> 1 & 3 : number & 7) << 4;
}

// In a ring the number of a cell is chosen such that the partners of every patch count on by one.
LOCAL_ATTENTION_BOTH int cell_number(int y, int x, int halo_columns) { return y * halo_columns + x; }

// The partner to read in place of partner n, which may only fill up the last group: one in another bank than the real
// ones around it.
LOCAL_ATTENTION_BOTH int real_partner(int n, int count) { return n < count ? n : n % 8 < count ? n % 8 : 0; }

// floor(n / divisor) without a division, for 16 <= divisor, n < 2^16 and n * divisor < 2^20.
LOCAL_ATTENTION_BOTH uint32_t reciprocal(int divisor) { return (1u << 20) / static_cast<uint32_t>(divisor) + 1; }
LOCAL_ATTENTION_BOTH int divide_by(int n, uint32_t reciprocal) {
  return static_cast<int>((static_cast<uint32_t>(n) * reciprocal) >> 20);
}

// --- who sees whom ---------------------------------------------------------------------------------------------

// Rows (columns) of the halo of a patch, given those of the window.
LOCAL_ATTENTION_BOTH int halo_extent(int window_extent) { return PATCH - 1 + window_extent; }

// Whether query i of a patch sees the key at (row, column) of the patch's halo, which starts window.top above and
// window.left before the patch.
LOCAL_ATTENTION_BOTH bool query_sees(const Window& w, int i, int row, int column) {
  return sees(w, row - w.top - i / PATCH, column - w.left - i % PATCH);
}

// Whether key i of a patch is seen by the query at (row, column) of the halo of the mirrored window.
LOCAL_ATTENTION_BOTH bool key_seen_by(const Window& w, int i, int row, int column) {
  return sees(w, i / PATCH + w.bottom - row, i % PATCH + w.right - column);
}

// A lane's eight elements of one group as bits 4 t + e, for patches whose halo lies inside the grid.
template <typename Visible>
LOCAL_ATTENTION_BOTH uint32_t element_bits(int lane, int group, int halo_columns, int count, const Visible& visible) {
  uint32_t bits = 0;
  for (int t = 0; t < 2; ++t)
    for (int e = 0; e < 4; ++e) {
      const int n = group * GROUP + element_column(lane, t, e);
      if (n < count && visible(element_row(lane, e), n / halo_columns, n % halo_columns)) bits |= 1u << (4 * t + e);
    }
  return bits;
}

// The bits of the two elements of tile t that belong to column e % 2.
LOCAL_ATTENTION_BOTH uint32_t column_bits(int t, int column) { return 5u << (4 * t + column); }

// How many coarse cells `extent` fine cells can touch that start at a multiple of `extent`.
LOCAL_ATTENTION_BOTH int coarse_extent(int extent, int ratio) {
  if (extent % ratio == 0) return extent / ratio;
  if (ratio % extent == 0) return 1;
  return (extent + ratio - 2) / ratio + 1;
}

// --- what a block works on -------------------------------------------------------------------------------------

struct StripPlan {
  int warps;        // four for every four rows of a step
  int step;         // rows from one step to the next: 4 for every four warps
  int ahead;        // 1: the next step's rows are fetched while this step is computed
  int halo_columns, halo_count, halo_groups, halo_top, halo_left;
  int ring_needed, ring_rows, ring_columns;
  uint32_t column_reciprocal;                         // of ring_columns
  int tile_rows, tile_columns, tile_halo, tile_keys;  // coarse cells of a step; of a patch: columns, keys up to
  int token_rows;                                     // tokens, rounded up to whole groups
  int strips, bands, band_rows;
  // Bytes from the start of shared memory. `second`: from a cell of the first tensor to the same of the second.
  uint32_t ring_second, tiles, tile_bytes, tile_second, tokens, token_second;
  uint32_t slots, bits, token_bias, statistics, tables, table_bytes, parked, block, bytes;
};

// Where a block's work lies; kept in shared memory.
struct BlockPlace {
  int batch, head, left, first_row, end_row;
};

struct StripShape {
  int channels, rows, columns;
  bool local, cross;
  bool statistics;  // the ring holds queries with their statistics
  Window window;  // mirrored for key patches
  int cross_rows, cross_columns;
  Window cross_window;
  int tokens;
};

LOCAL_ATTENTION_BOTH StripPlan plan_strip(const StripShape& s, int warps, int ahead) {
  StripPlan plan = {};
  const uint32_t cell = 2 * static_cast<uint32_t>(s.channels);
  plan.warps = warps;
  plan.step = warps;
  plan.ahead = ahead;
  uint32_t at = 0;
  if (s.local) {
    plan.halo_top = s.window.top;
    plan.halo_left = s.window.left;
    plan.halo_columns = halo_extent(window_columns(s.window));
    plan.halo_count = halo_extent(window_rows(s.window)) * plan.halo_columns;
    plan.halo_groups = round_up(plan.halo_count, GROUP) / GROUP;
    plan.ring_needed = plan.step + window_rows(s.window) - 1;
    plan.ring_rows = plan.ring_needed + ahead * plan.step;
    plan.ring_columns = STRIP + window_columns(s.window) - 1;
    plan.column_reciprocal = reciprocal(plan.ring_columns);
    plan.ring_second = static_cast<uint32_t>(round_up(plan.ring_rows * plan.ring_columns * cell, 128));
    at += 2 * plan.ring_second;
  }
  if (s.cross) {
    const int a = s.rows / s.cross_rows, b = s.columns / s.cross_columns;
    const int more_rows = window_rows(s.cross_window) - 1, more_columns = window_columns(s.cross_window) - 1;
    plan.tile_rows = coarse_extent(plan.step, a) + more_rows;
    plan.tile_columns = coarse_extent(STRIP, b) + more_columns;
    plan.tile_halo = coarse_extent(PATCH, b) + more_columns;
    plan.tile_keys = round_up((coarse_extent(PATCH, a) + more_rows) * plan.tile_halo, GROUP);
    plan.tile_second = static_cast<uint32_t>(round_up(plan.tile_rows * plan.tile_columns * cell, 128));
    plan.tile_bytes = 2 * plan.tile_second;
    plan.tiles = at;
    at += (1 + ahead) * plan.tile_bytes;
  }
  plan.token_rows = round_up(s.tokens, GROUP);
  plan.token_second = static_cast<uint32_t>(plan.token_rows) * cell;
  plan.tokens = at;
  at += 2 * plan.token_second;
  plan.statistics = at;  // 8 bytes for every cell of the ring
  if (s.statistics) at += static_cast<uint32_t>(plan.ring_rows * plan.ring_columns) * 8;
  plan.token_bias = at;
  at += static_cast<uint32_t>(plan.token_rows) * 4;
  plan.tables = at;  // 8 bytes for every coarse key of each warp's patch
  plan.table_bytes = static_cast<uint32_t>(plan.tile_keys) * 8;
  at += static_cast<uint32_t>(warps) * plan.table_bytes;
  at = static_cast<uint32_t>(round_up(static_cast<int>(at), 16));
  plan.parked = at;  // 128 channels: 32 * 16 bytes for every 16 channels of each warp's values
  if (s.statistics && s.channels == 128) at += static_cast<uint32_t>(warps) * 8 * 512;
  plan.block = at;  // a BlockPlace
  at += 32;
  plan.slots = at;  // of every partner, 2 bytes
  at += static_cast<uint32_t>(plan.halo_groups) * GROUP * 2;
  plan.bits = at;
  at += static_cast<uint32_t>(plan.halo_groups) * LANES;
  plan.bytes = static_cast<uint32_t>(round_up(static_cast<int>(at), 16));
  plan.strips = (s.columns + STRIP - 1) / STRIP;
  plan.bands = 1;
  plan.band_rows = round_up(s.rows, plan.step);
  return plan;
}

// Cuts the rows into bands such that the blocks fill the device evenly. Every band loads its halo anew, at about half
// the cost of rows that are also computed.
LOCAL_ATTENTION_BOTH void cut_bands(StripPlan& plan, int rows, int64_t planes, int64_t resident_blocks) {
  const int steps = (rows + plan.step - 1) / plan.step;
  int64_t best = INT64_MAX;
  for (int bands = 1; bands <= steps && bands <= 16; ++bands) {
    const int band_rows = (steps + bands - 1) / bands * plan.step;
    const int64_t blocks = planes * plan.strips * ((rows + band_rows - 1) / band_rows);
    const int64_t cost = (blocks + resident_blocks - 1) / resident_blocks *
                         (2 * band_rows + (plan.ring_needed > plan.step ? plan.ring_needed - plan.step : 0));
    if (cost >= best) continue;
    best = cost;
    plan.band_rows = band_rows;
    plan.bands = (rows + band_rows - 1) / band_rows;
  }
}

}  // namespace tile
}  // namespace local_attention
