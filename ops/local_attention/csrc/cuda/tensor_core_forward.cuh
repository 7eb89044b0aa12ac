// Forward pass on tensor cores: a warp holds 16 queries and meets their keys, 48 at a time, with an online softmax.
#pragma once

#include "tensor_core.cuh"

namespace local_attention {
namespace tensor_core {

constexpr int CHUNK = 3;  // groups between two looks at the running maximum

// Two 8-warp blocks share a multiprocessor where 128 registers suffice.
template <int D>
constexpr int STRIP_BLOCKS = D == 128 ? 1 : 2;

template <int D>
struct RunningSoftmax {
  float out[D / 8][4];
  float largest[2], sum[2];  // of two rows; the sum over this lane's columns only

  LOCAL_ATTENTION_DEVICE void reset() {
    clear(out);
    largest[0] = largest[1] = minus_infinity();
    sum[0] = sum[1] = 0;
  }
};

// Adds groups first .. first + GROUPS - 1 to the softmax. `second`: bytes from keys to values.
template <typename T, int D, int GROUPS, typename Partners, typename Dropout>
LOCAL_ATTENTION_DEVICE void attend_chunk(RunningSoftmax<D>& softmax, const HeldRows<D>& query,
                                         const Partners& partners, int first, uint32_t second, float scale,
                                         const Dropout& dropout) {
  float scores[2 * GROUPS][4];
  uint32_t rows[GROUPS], seen[GROUPS];
  clear(scores);
  LOCAL_ATTENTION_UNROLL for (int j = 0; j < GROUPS; ++j) {
    rows[j] = partners.row(first + j);
    multiply_by_cells<T, D>(scores[2 * j], scores[2 * j + 1], query, rows[j]);
  }
  partners.visible(first, seen);
  LOCAL_ATTENTION_UNROLL for (int j = 0; j < GROUPS; ++j) {
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2; ++t) {
      LOCAL_ATTENTION_UNROLL for (int e = 0; e < 4; ++e) {
        float& score = scores[2 * j + t][e];
        if (Partners::BIASED) score = score * scale + partners.bias(first + j, t, e);
        if (Partners::MASKED) score = seen[j] >> (4 * t + e) & 1 ? score : minus_infinity();
      }
    }
  }
  const float factor = Partners::BIASED ? 1.0f : scale;
  LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
    float most = scores[0][2 * h];
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2 * GROUPS; ++t)
      most = fmaxf(most, fmaxf(scores[t][2 * h], scores[t][2 * h + 1]));
    most = fmaxf(most, shuffle_xor(most, 1));
    most = fmaxf(most, shuffle_xor(most, 2));
    const float largest = fmaxf(softmax.largest[h], most * factor);
    const float reference = largest == minus_infinity() ? 0.0f : largest;  // nothing seen yet: all weights 0
    const float shrink = exp2_fast(softmax.largest[h] - reference);
    softmax.largest[h] = largest;
    float sum = 0;
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2 * GROUPS; ++t) {
      LOCAL_ATTENTION_UNROLL for (int e = 2 * h; e < 2 * h + 2; ++e) {
        scores[t][e] = exp2_fast(scores[t][e] * factor - reference);
        sum += scores[t][e];
      }
    }
    softmax.sum[h] = softmax.sum[h] * shrink + sum;
    LOCAL_ATTENTION_UNROLL for (int t = 0; t < D / 8; ++t) {
      softmax.out[t][2 * h] *= shrink;
      softmax.out[t][2 * h + 1] *= shrink;
    }
  }
  LOCAL_ATTENTION_UNROLL for (int j = 0; j < GROUPS; ++j) {
    if (Dropout::ACTIVE) {
      LOCAL_ATTENTION_UNROLL for (int t = 0; t < 2; ++t) {
        LOCAL_ATTENTION_UNROLL for (int e = 0; e < 4; ++e)
          scores[2 * j + t][e] *= dropout.of(e / 2, partners.slot(first + j, t, e));
      }
    }
    uint32_t weights[4];
    pack_scores<T>(weights, scores[2 * j], scores[2 * j + 1]);
    add_cells<T, D>(softmax.out, weights, transposed_row(rows[j]) + second);
  }
}

template <typename T, int D, typename Partners, typename Dropout>
LOCAL_ATTENTION_DEVICE void attend(RunningSoftmax<D>& softmax, const HeldRows<D>& query, const Partners& partners,
                                   uint32_t second, float scale, const Dropout& dropout) {
  int g = partners.first;
  LOCAL_ATTENTION_NO_UNROLL for (; g + CHUNK <= partners.end; g += CHUNK)
    attend_chunk<T, D, CHUNK>(softmax, query, partners, g, second, scale, dropout);
  LOCAL_ATTENTION_NO_UNROLL for (; g < partners.end; ++g)
    attend_chunk<T, D, 1>(softmax, query, partners, g, second, scale, dropout);
}

template <typename T, int D, typename Dropout>
struct ForwardWork {
  const Problem& p;
  const StripPlan& plan;
  const Scale& scale;
  uint32_t shared;
  HeldRows<D> query;

  LOCAL_ATTENTION_DEVICE ForwardWork(const Problem& problem, const StripPlan& strip_plan, const Scale& scores,
                                     uint32_t shared_start)
      : p(problem), plan(strip_plan), scale(scores), shared(shared_start) {}
  LOCAL_ATTENTION_DEVICE void fetch(const Block& block, const Step& step, int skip, int count, int tile_y0) const {
    fetch_keys<D>(p, plan, block, shared, step, skip, count, tile_y0);
  }
  LOCAL_ATTENTION_DEVICE void prepare(const Step& step) {
    const Block block(plan);
    load_patch<D>(query, Plane(p.query, block.batch, block.head), step.patch(p, block), scale.sign_flip);
  }
  LOCAL_ATTENTION_DEVICE void run(const Step& step) {
    RunningSoftmax<D> softmax;
    softmax.reset();
    {
      const Block block(plan);
      const Patch patch = step.patch(p, block);
      const Dropout dropout(p, block, patch);
      if (plan.token_rows)
        attend<T, D>(softmax, query, TokenKeys<D>(plan, shared), plan.token_second, scale.factor, dropout);
      if (plan.tile_rows)
        attend<T, D>(softmax, query, CrossKeys<D>(p, plan, block, shared, patch, step.y0), plan.tile_second,
                     scale.factor, dropout);
      if (plan.ring_rows)
        attend<T, D>(softmax, query,
                     RingPartners<D, false>(p, plan, step.ring, shared, patch, Step::patch_row(), Step::patch_column()),
                     plan.ring_second, scale.factor, dropout);
    }
    const Block block(plan);
    const Patch patch = step.patch(p, block);
    float factor[2];
    LOCAL_ATTENTION_UNROLL for (int h = 0; h < 2; ++h) {
      float sum = softmax.sum[h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      factor[h] = sum > 0 ? 1 / sum : 0;
      if (patch.inside[h] && lane_index() % 4 == 0)
        static_cast<float*>(p.lse)[plain::query_number(p, block.batch, patch.y[h], patch.x[h], block.head)] =
            sum > 0 ? (softmax.largest[h] + log2_fast(sum)) * LN_2 : minus_infinity();
    }
    store_patch<T, D>(Plane(p.out, block.batch, block.head), patch, softmax.out, factor);
  }
};

template <typename T, int D, typename Dropout>
LOCAL_ATTENTION_KERNEL(256, Dropout::ACTIVE ? 1 : STRIP_BLOCKS<D>)
strip_forward(const Problem p, const StripPlan plan, const Scale scale) {
  const uint32_t shared = shared_address(shared_memory());
  begin_query_strip<D>(p, plan, shared);
  ForwardWork<T, D, Dropout> work(p, plan, scale, shared);
  walk_strip(p, plan, work);
}

}  // namespace tensor_core
}  // namespace local_attention
