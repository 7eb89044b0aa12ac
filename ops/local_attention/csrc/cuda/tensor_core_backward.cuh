// Backward pass on tensor cores: three gathers, so that every gradient is summed by one warp in one order.
//
// With p the softmax weights, g the gradient of out, and dp = g . v:  ds = p * (dp - delta), where delta is
// rowsum(g * out) minus the gradient of lse;  dq = scale * sum ds k,  dk = scale * sum ds q,  dv = sum p g.
// The first kernel holds queries, sums dq and leaves delta for the other two, which hold keys: of the local grid, a
// strip at a time, and of the coarse grid or the tokens, streaming all queries that see them.
#pragma once

#include "tensor_core.cuh"

namespace local_attention {
namespace tensor_core {

// Of a query, left in the workspace as [B, H, Y, X].
struct alignas(8) Statistics {
  float lse;  // in units of log 2; infinity where the query saw nothing, so that all its weights are 0
  float delta;
};

LOCAL_ATTENTION_DEVICE int64_t statistics_start(const Problem& p, int batch, int head) {
  return (batch * p.heads + head) * p.rows * p.columns;
}

// --- gradient of the queries -----------------------------------------------------------------------------------

template <typename T, int D, typename Dropout>
struct QueryGradientWork {
  const Problem& p;
  const StripPlan& plan;
  const Scale& scale;
  Statistics* statistics;
  uint32_t shared;
  HeldRows<D> query, grad_out;
  Statistics own[2];

  LOCAL_ATTENTION_DEVICE QueryGradientWork(const Problem& problem, const StripPlan& strip_plan, const Scale& scores,
                                           Statistics* all, uint32_t shared_start)
      : p(problem), plan(strip_plan), scale(scores), statistics(all), shared(shared_start) {}

  LOCAL_ATTENTION_DEVICE void fetch(const Block& block, const Step& step, int skip, int count, int tile_y0) const {
    fetch_keys<D>(p, plan, block, shared, step, skip, count, tile_y0);
  }

  LOCAL_ATTENTION_DEVICE void prepare(const Step& step) {
    const Block block(plan);
    const Patch patch = step.patch(p, block);
    load_patch<D>(query, Plane(p.query, block.batch, block.head), patch, scale.sign_flip);
    load_patch<D>(grad_out, Plane(p.grad_out, block.batch, block.head), patch, 0);
    const Plane out(p.out, block.batch, block.head);
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
      float delta = 0;
      if (patch.inside[h]) {
        const char* row = out.at(patch.y[h], patch.x[h]) + lane_index() % 4 * 4;
        LOCAL_ATTENTION_UNROLL for (int k = 0; k < D / 16; ++k) {
          LOCAL_ATTENTION_UNROLL for (int half = 0; half < 2; ++half) {
            const uint32_t o = *reinterpret_cast<const uint32_t*>(row + k * 32 + half * 16);
            const uint32_t g = grad_out.parts[k][h + 2 * half];
            delta += low_half<T>(o) * low_half<T>(g);
            delta += high_half<T>(o) * high_half<T>(g);
          }
        }
      }
      delta += shuffle_xor(delta, 1);
      delta += shuffle_xor(delta, 2);
      own[h] = {-minus_infinity(), 0};
      if (!patch.inside[h]) continue;
      const int64_t number = plain::query_number(p, block.batch, patch.y[h], patch.x[h], block.head);
      const float lse = static_cast<const float*>(p.lse)[number];
      if (lse != minus_infinity()) own[h].lse = lse * LOG2_E;
      own[h].delta = delta - (p.grad_lse ? static_cast<const float*>(p.grad_lse)[number] : 0);
      if (lane_index() % 4 == 0)
        statistics[statistics_start(p, block.batch, block.head) + patch.y[h] * p.columns + patch.x[h]] = own[h];
    }
  }

  template <typename Partners>
  LOCAL_ATTENTION_DEVICE void add(float (&sums)[D / 8][4], const Partners& partners, uint32_t second,
                                  const Dropout& dropout) const {
    LOCAL_ATTENTION_NO_UNROLL for (int g = partners.first; g < partners.end; ++g) {
      const uint32_t row = partners.row(g);
      float scores[2][4], grads[2][4];  // products, then in place: of scores
      clear(scores);
      clear(grads);
      multiply_by_cells<T, D>(scores[0], scores[1], query, row);
      multiply_by_cells<T, D>(grads[0], grads[1], grad_out, row + second);
      const uint32_t seen = Partners::MASKED ? partners.visible(g) : 255;
      LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2; ++t) {
        LOCAL_ATTENTION_UNROLL for (int e = 0; e < 4; ++e) {
          const float offset = (Partners::BIASED ? partners.bias(g, t, e) : 0) - own[e / 2].lse;
          float weight = exp2_fast(scores[t][e] * scale.factor + offset);
          if (Partners::MASKED) weight = seen >> (4 * t + e) & 1 ? weight : 0;
          float grad = grads[t][e];
          if (Dropout::ACTIVE) grad *= dropout.of(e / 2, partners.slot(g, t, e));
          grads[t][e] = weight * (grad - own[e / 2].delta);
        }
      }
      uint32_t a[4];
      pack_scores<T>(a, grads[0], grads[1]);
      add_cells<T, D>(sums, a, transposed_row(row));
    }
  }

  LOCAL_ATTENTION_DEVICE void run(const Step& step) {
    if (!p.grad_query.data) return;
    float sums[D / 8][4];
    clear(sums);
    {
      const Block block(plan);
      const Patch patch = step.patch(p, block);
      const Dropout dropout(p, block, patch);
      if (plan.token_rows) add(sums, TokenKeys<D>(plan, shared), plan.token_second, dropout);
      if (plan.tile_rows) add(sums, CrossKeys<D>(p, plan, block, shared, patch, step.y0), plan.tile_second, dropout);
      if (plan.ring_rows)
        add(sums,
            RingPartners<D, false>(p, plan, step.ring, shared, patch, Step::patch_row(), Step::patch_column()),
            plan.ring_second, dropout);
    }
    const Block block(plan);
    const float factor = static_cast<float>(p.scale);
    store_patch<T, D>(Plane(p.grad_query, block.batch, block.head), step.patch(p, block), sums, {factor, factor});
  }
};

template <typename T, int D, typename Dropout>
LOCAL_ATTENTION_KERNEL(256, Dropout::ACTIVE || D == 128 ? 1 : 2)
strip_query_gradient(const Problem p, const StripPlan plan, const Scale scale, Statistics* statistics) {
  const uint32_t shared = shared_address(shared_memory());
  begin_query_strip<D>(p, plan, shared);
  QueryGradientWork<T, D, Dropout> work(p, plan, scale, statistics, shared);
  walk_strip(p, plan, work);
}

// --- gradients of keys and values ------------------------------------------------------------------------------

// What a key patch keeps of its values: at 128 channels the registers do not hold them too.
template <int D>
struct ValueRows : HeldRows<D> {
  static constexpr uint32_t BYTES = 0;
  LOCAL_ATTENTION_DEVICE ValueRows(uint32_t) {}
};
template <>
struct ValueRows<128> : ParkedRows<128> {
  static constexpr uint32_t BYTES = 128 / 16 * PARKED_BYTES;  // of one warp
  // `start`: in shared memory, of the first warp's.
  LOCAL_ATTENTION_DEVICE ValueRows(uint32_t start) {
    const uint32_t own = start + static_cast<uint32_t>(warp_index()) * BYTES;
    parts = reinterpret_cast<Quad*>(shared_memory() + own) + lane_index();
  }
};

template <int D>
struct KeySums {
  float key[D / 8][4], value[D / 8][4];
  float bias[2];  // sums of score gradients of two rows, over this lane's columns
};

// Adds 16 queries to the gradients of 16 keys. `queries` answers: visible(t, e), statistics(t, column),
// bias(h) and factor(t, e), that of dropout.
template <typename T, int D, typename Queries>
LOCAL_ATTENTION_DEVICE void add_queries(KeySums<D>& sums, const HeldRows<D>& key, const ValueRows<D>& value,
                                        uint32_t row, uint32_t second, const Scale& scale, const Queries& queries) {
  float weights[2][4], grads[2][4];
  clear(weights);
  clear(grads);
  multiply_by_cells<T, D>(weights[0], weights[1], key, row);
  multiply_by_cells<T, D>(grads[0], grads[1], value, row + second);
  LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2; ++t) {
    LOCAL_ATTENTION_UNROLL for (int column = 0; column < 2; ++column) {
      const Statistics statistics = queries.statistics(t, column);
      LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
        const int e = 2 * h + column;
        float weight = exp2_fast(weights[t][e] * scale.factor + (queries.bias(h) - statistics.lse));
        weight = queries.visible(t, e) ? weight : 0;
        const float factor = queries.factor(t, e);
        grads[t][e] = weight * (grads[t][e] * factor - statistics.delta);
        weights[t][e] = weight * factor;
        sums.bias[h] += grads[t][e];
      }
    }
  }
  uint32_t a[4];
  pack_scores<T>(a, weights[0], weights[1]);
  const uint32_t transposed = transposed_row(row);
  add_cells<T, D>(sums.value, a, transposed + second);
  pack_scores<T>(a, grads[0], grads[1]);
  add_cells<T, D>(sums.key, a, transposed);
}

template <int D>
LOCAL_ATTENTION_DEVICE void clear(KeySums<D>& sums) {
  clear(sums.key);
  clear(sums.value);
  sums.bias[0] = sums.bias[1] = 0;
}

template <typename T, int D>
LOCAL_ATTENTION_DEVICE void store_sums(const Problem& p, const KeySums<D>& sums, const Patch& patch, const Plane& key,
                                       const Plane& value) {
  const float factor = static_cast<float>(p.scale);
  if (key.data) store_patch<T, D>(key, patch, sums.key, {factor, factor});
  if (value.data) store_patch<T, D>(value, patch, sums.value, {1, 1});
}

// Queries of a local key patch: one group of the ring.
template <int D, bool DROPOUT>
struct RingQueries {
  const RingPartners<D, true>& partners;
  const plain::Dropout& dropout;
  const Statistics* all;
  int g;
  uint32_t seen;

  LOCAL_ATTENTION_DEVICE Statistics statistics(int t, int column) const {
    uint32_t cells[2];
    partners.cells(g, t, cells);
    return all[cells[column]];
  }
  LOCAL_ATTENTION_DEVICE bool visible(int t, int e) const { return seen >> (4 * t + e) & 1; }
  LOCAL_ATTENTION_DEVICE float bias(int) const { return 0; }
  LOCAL_ATTENTION_DEVICE float factor(int t, int e) const {
    return DROPOUT ? dropout.of<float>(partners.query(g, t, e), partners.slot(g, t, e)) : 1;
  }
};

template <typename T, int D, bool DROPOUT>
struct KeyGradientWork {
  const Problem& p;
  const StripPlan& plan;
  const Scale& scale;
  const Statistics* statistics;
  uint32_t shared;
  HeldRows<D> key;
  ValueRows<D> value;

  LOCAL_ATTENTION_DEVICE KeyGradientWork(const Problem& problem, const StripPlan& strip_plan, const Scale& scores,
                                         const Statistics* all, uint32_t shared_start)
      : p(problem), plan(strip_plan), scale(scores), statistics(all), shared(shared_start), value(strip_plan.parked) {}

  LOCAL_ATTENTION_DEVICE void fetch(const Block& block, const Step& step, int skip, int count, int) const {
    step.ring.fetch<D>(p, plan, block, Plane(p.query, block.batch, block.head),
                       Plane(p.grad_out, block.batch, block.head), shared, step.y0, skip, count,
                       reinterpret_cast<const char*>(statistics + statistics_start(p, block.batch, block.head)));
  }
  LOCAL_ATTENTION_DEVICE void prepare(const Step& step) {
    const Block block(plan);
    const Patch patch = step.patch(p, block);
    load_patch<D>(key, Plane(p.key, block.batch, block.head), patch, scale.sign_flip);
    load_patch<D>(value, Plane(p.value, block.batch, block.head), patch, 0);
  }
  LOCAL_ATTENTION_DEVICE void run(const Step& step) {
    KeySums<D> sums;
    clear(sums);
    {
      const Block block(plan);
      const RingPartners<D, true> partners(p, plan, step.ring, shared, step.patch(p, block), Step::patch_row(),
                                           Step::patch_column());
      const plain::Dropout dropout(p, block.batch, block.head);
      const Statistics* all = reinterpret_cast<const Statistics*>(shared_memory() + plan.statistics);
      LOCAL_ATTENTION_NO_UNROLL for (int g = partners.first; g < partners.end; ++g)
        add_queries<T, D>(sums, key, value, partners.row(g), plan.ring_second, scale,
                          RingQueries<D, DROPOUT>{partners, dropout, all, g, partners.visible(g)});
    }
    const Block block(plan);
    store_sums<T, D>(p, sums, step.patch(p, block), Plane(p.grad_key, block.batch, block.head),
                     Plane(p.grad_value, block.batch, block.head));
  }
};

constexpr int KEY_THREADS = 128;
template <int D>
constexpr int KEY_BLOCKS = D == 128 ? 1 : 3;

template <typename T, int D, bool DROPOUT>
LOCAL_ATTENTION_KERNEL(KEY_THREADS, DROPOUT ? 1 : KEY_BLOCKS<D>)
strip_key_gradient(const Problem p, const StripPlan plan, const Scale scale, const Statistics* statistics) {
  const uint32_t shared = shared_address(shared_memory());
  Block::write(p, plan);
  write_tables(plan, [&](int i, int row, int column) { return tile::key_seen_by(p.window, i, row, column); });
  block_barrier();
  KeyGradientWork<T, D, DROPOUT> work(p, plan, scale, statistics, shared);
  walk_strip(p, plan, work);
}

// --- coarse keys and tokens ------------------------------------------------------------------------------------

// Bytes of one stage of a warp: rows of the query and of grad_out, then statistics and places of 16 queries.
template <int D>
constexpr uint32_t STAGE_BYTES = GROUP * (2 * CELL<D> + 16);
constexpr int STREAM_WARPS = 4;
template <int D>
constexpr uint32_t STREAM_BYTES = STREAM_WARPS * (2 * STAGE_BYTES<D> + ValueRows<D>::BYTES);

struct StreamPlan {
  int patches, patch_columns;  // of one (batch, head)
  int row_ratio, column_ratio;  // of the coarse grid; 1 for tokens
  uint32_t window_rows, window_columns;
};

// Of a query in a stage.
struct alignas(8) Place {
  int query;        // its number in the grid
  uint32_t centre;  // row << 16 | column of the coarse cell above it; NOWHERE: there is no such query
};
constexpr uint32_t NOWHERE = 0x40000000;

// The queries that may see a key patch: a rectangle in raster order.
struct QueryRectangle {
  int top, left, columns, count;
};

template <bool TOKENS>
struct StreamQueries {
  const Statistics* all;
  const Place* places;
  const Patch& patch;
  const plain::Dropout& dropout;
  uint32_t key_places[2];  // of this lane's rows, such that key - centre is the place in the window
  const StreamPlan& plan;
  int first_slot;
  float biases[2];

  LOCAL_ATTENTION_DEVICE const Place& place(int t, int e) const {
    return places[tile::element_column(lane_index(), t, e)];
  }
  LOCAL_ATTENTION_DEVICE Statistics statistics(int t, int column) const {
    return all[tile::element_column(lane_index(), t, column)];
  }
  LOCAL_ATTENTION_DEVICE float bias(int h) const { return biases[h]; }
  LOCAL_ATTENTION_DEVICE bool visible(int t, int e) const {
    const uint32_t centre = place(t, e).centre;
    if (!patch.inside[e / 2] || centre == NOWHERE) return false;
    if (TOKENS) return true;
    const uint32_t at = key_places[e / 2] - centre;
    return at >> 16 < plan.window_rows && (at & 0xffff) < plan.window_columns;
  }
  LOCAL_ATTENTION_DEVICE float factor(int t, int e) const {
    if (!dropout.threshold) return 1;
    const uint32_t at = key_places[e / 2] - place(t, e).centre;
    const int slot = TOKENS ? patch.x[e / 2] : static_cast<int>((at >> 16) * plan.window_columns + (at & 0xffff));
    return dropout.of<float>(place(t, e).query, first_slot + slot);
  }
};

// One block sums the gradients of 16 keys: 4x4 coarse cells, or 16 tokens. Each warp takes every fourth group of 16
// queries; in the end the first warp adds what the others have, in order.
// `bias_parts`: sums of score gradients, for tokens [B, H, T], for coarse keys one number of each block; null: not
// wanted.
template <typename T, int D, bool TOKENS>
LOCAL_ATTENTION_KERNEL(32 * STREAM_WARPS, D == 128 ? 1 : 3)
stream_key_gradient(const Problem p, const StreamPlan plan, const Scale scale, const Statistics* statistics,
                    float* bias_parts) {
  const int lane = lane_index(), warp = warp_index();
  const int64_t plane = block_index() / plan.patches;
  const int patch_number = static_cast<int>(block_index() % plan.patches);
  const int batch = static_cast<int>(plane / p.heads), head = static_cast<int>(plane % p.heads);
  const int columns = static_cast<int>(p.columns);

  Patch patch(patch_number / plan.patch_columns * PATCH, patch_number % plan.patch_columns * PATCH,
              static_cast<int>(p.cross_rows), static_cast<int>(p.cross_columns));
  QueryRectangle rectangle;
  if (TOKENS) {
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
      patch.y[h] = 0;
      patch.x[h] = patch_number * GROUP + lane / 4 + 8 * h;
      patch.inside[h] = patch.x[h] < p.tokens;
    }
    rectangle = {0, 0, columns, static_cast<int>(p.rows) * columns};
  } else {
    const Window back = mirrored(p.cross_window);
    const int top = highest(patch.top - back.top, 0), left = highest(patch.left - back.left, 0);
    const int end_row = lowest(patch.top + PATCH + back.bottom, static_cast<int>(p.cross_rows));
    const int end_column = lowest(patch.left + PATCH + back.right, static_cast<int>(p.cross_columns));
    rectangle.top = top * plan.row_ratio;
    rectangle.left = left * plan.column_ratio;
    rectangle.columns = (end_column - left) * plan.column_ratio;
    rectangle.count = (end_row - top) * plan.row_ratio * rectangle.columns;
  }

  HeldRows<D> key;
  ValueRows<D> value(STREAM_WARPS * 2 * STAGE_BYTES<D>);
  load_patch<D>(key, Plane(TOKENS ? p.token_key : p.cross_key, batch, head), patch, scale.sign_flip);
  load_patch<D>(value, Plane(TOKENS ? p.token_value : p.cross_value, batch, head), patch, 0);
  const plain::Dropout dropout(p, batch, head);
  StreamQueries<TOKENS> queries{nullptr,
                                nullptr,
                                patch,
                                dropout,
                                {0, 0},
                                plan,
                                TOKENS ? 0 : static_cast<int>(p.tokens),
                                {0, 0}};
  LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
    if (TOKENS) {
      if (p.token_bias && patch.inside[h])
        queries.biases[h] = static_cast<const float*>(p.token_bias)[batch * p.tokens + patch.x[h]] * LOG2_E;
    } else {
      queries.key_places[h] =
          static_cast<uint32_t>((patch.y[h] + p.cross_window.top) << 16 | (patch.x[h] + p.cross_window.left));
      if (p.cross_bias) queries.biases[h] = *static_cast<const float*>(p.cross_bias) * LOG2_E;
    }
  }

  unsigned char* const own = shared_memory() + static_cast<uint32_t>(warp) * 2 * STAGE_BYTES<D>;
  const auto fetch = [&](int group, int stage) {
    unsigned char* const start = own + static_cast<uint32_t>(stage) * STAGE_BYTES<D>;
    const int n = group * GROUP + lane % GROUP;
    const int row = n / rectangle.columns;
    const int y = rectangle.top + row, x = rectangle.left + n - row * rectangle.columns;
    const bool exists = n < rectangle.count;
    if (lane < GROUP) {
      const int number = y * columns + x;
      copy_async_8(shared_address(start + 2 * GROUP * CELL<D> + lane * 8),
                   statistics + statistics_start(p, batch, head) + (exists ? number : 0), exists);
      const int coarse = TOKENS ? 0 : (y / plan.row_ratio) << 16 | x / plan.column_ratio;
      reinterpret_cast<Place*>(start + 2 * GROUP * CELL<D> + GROUP * 8)[lane] = {
          number, exists ? static_cast<uint32_t>(coarse) : NOWHERE};
    }
    constexpr int CHUNKS = D / 8, CELLS_AT_ONCE = 32 / CHUNKS;
    const Plane query(p.query, batch, head), grad_out(p.grad_out, batch, head);
    const uint32_t chunk = static_cast<uint32_t>(lane % CHUNKS) << 4;
    const int packed = exists ? y << 16 | x : -1;
    LOCAL_ATTENTION_NO_UNROLL for (int i = lane / CHUNKS; i < GROUP; i += CELLS_AT_ONCE) {
      const int at = shuffle(packed, i);
      const int cell_y = at < 0 ? 0 : at >> 16, cell_x = at < 0 ? 0 : at & 0xffff;
      const uint32_t to = shared_address(start) + static_cast<uint32_t>(i) * CELL<D> + (chunk ^ tile::spread<D>(i));
      copy_async(to, query.at(cell_y, cell_x) + chunk, at >= 0);
      copy_async(to + GROUP * CELL<D>, grad_out.at(cell_y, cell_x) + chunk, at >= 0);
    }
  };

  KeySums<D> sums;
  clear(sums);
  const int groups = (rectangle.count + GROUP - 1) / GROUP;
  const uint32_t partner = static_cast<uint32_t>(tile::loaded_partner(lane));
  const uint32_t mix = static_cast<uint32_t>(tile::loaded_half(lane)) << 4 ^ tile::spread<D>(static_cast<int>(partner));
  if (warp < groups) fetch(warp, 0);
  copy_commit();
  int stage = 0;
  LOCAL_ATTENTION_NO_UNROLL for (int group = warp; group < groups; group += STREAM_WARPS) {
    if (group + STREAM_WARPS < groups) fetch(group + STREAM_WARPS, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    warp_barrier();
    const unsigned char* start = own + static_cast<uint32_t>(stage) * STAGE_BYTES<D>;
    queries.all = reinterpret_cast<const Statistics*>(start + 2 * GROUP * CELL<D>);
    queries.places = reinterpret_cast<const Place*>(start + 2 * GROUP * CELL<D> + GROUP * 8);
    add_queries<T, D>(sums, key, value, (shared_address(start) + partner * CELL<D>) ^ mix, GROUP * CELL<D>, scale,
                      queries);
    warp_barrier();
    stage ^= 1;
  }

  constexpr int VALUES = D + 2;  // of one lane
  float* const others = reinterpret_cast<float*>(shared_memory());
  const auto each = [&](const auto& act) {
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < D / 8; ++t) {
      LOCAL_ATTENTION_UNROLL for (int e = 0; e < 4; ++e) {
        act(sums.key[t][e], t * 4 + e);
        act(sums.value[t][e], D / 2 + t * 4 + e);
      }
    }
    act(sums.bias[0], D);
    act(sums.bias[1], D + 1);
  };
  copy_wait<0>();
  block_barrier();
  if (warp > 0)
    each([&](float& sum, int n) { others[((warp - 1) * VALUES + n) * 32 + lane] = sum; });
  block_barrier();
  if (warp > 0) return;
  for (int other = 0; other < STREAM_WARPS - 1; ++other)
    each([&](float& sum, int n) { sum += others[(other * VALUES + n) * 32 + lane]; });
  store_sums<T, D>(p, sums, patch, Plane(TOKENS ? p.grad_token_key : p.grad_cross_key, batch, head),
                   Plane(TOKENS ? p.grad_token_value : p.grad_cross_value, batch, head));
  if (!bias_parts) return;
  if constexpr (TOKENS) {
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
      float sum = sums.bias[h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0 && patch.inside[h]) bias_parts[plane * p.tokens + patch.x[h]] = sum;
    }
  } else {
    const float total = warp_sum(sums.bias[0] + sums.bias[1]);
    if (lane == 0) bias_parts[block_index()] = total;
  }
}

}  // namespace tensor_core
}  // namespace local_attention
