// The CPU library: heads (and, forward, bands of rows) are shared out among threads; no result depends on how.
#include <omp.h>

#include <cstdio>

#include "backward.h"
#include "forward.h"

namespace local_attention {
namespace {

// Rows of one forward task. Each band packs the rows above and below it again, so it should not be thin.
constexpr int64_t BAND = 16;

template <class S, class T>
struct Plan {
  int64_t heads, bands, threads;
  ptrdiff_t thread_bytes, shared_bytes;

  Plan(const Problem& p, bool backward) {
    heads = p.batch * p.heads;
    // Whole heads where they keep all threads busy.
    bands = backward || heads >= 4 * p.threads ? 1 : (p.rows + BAND - 1) / BAND;
    threads = std::max<int64_t>(1, std::min(p.threads, heads * bands));
    thread_bytes = backward ? Backward<S, T>(p, nullptr).bytes() : Forward<S, T>(p, nullptr).bytes();
    // The shares of every head in the gradients of the biases.
    shared_bytes = backward ? round_up(heads * (p.tokens + 1) * static_cast<ptrdiff_t>(sizeof(T)), 64) : 0;
  }
  int64_t bytes() const { return shared_bytes + threads * thread_bytes; }
};

template <class S, class T>
void forward(const Problem& p) {
  const Plan<S, T> plan(p, false);
  char* workspace = static_cast<char*>(p.workspace);
  const int64_t tasks = plan.heads * plan.bands;
  const int64_t rows = plan.bands == 1 ? p.rows : BAND;
#pragma omp parallel num_threads(static_cast<int>(plan.threads))
  {
    Forward<S, T> worker(p, workspace + omp_get_thread_num() * plan.thread_bytes);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t head = task / plan.bands, begin = task % plan.bands * rows;
      worker.band(head / p.heads, head % p.heads, static_cast<int>(begin),
                  static_cast<int>(std::min(p.rows, begin + rows)));
    }
  }
}

template <class S, class T>
void backward(const Problem& p) {
  const Plan<S, T> plan(p, true);
  T* grad_bias = static_cast<T*>(p.workspace);
  T* grad_cross_bias = grad_bias + plan.heads * p.tokens;
  char* workspace = static_cast<char*>(p.workspace) + plan.shared_bytes;
#pragma omp parallel num_threads(static_cast<int>(plan.threads))
  {
    Backward<S, T> worker(p, workspace + omp_get_thread_num() * plan.thread_bytes);
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < plan.heads; ++head)
      worker.head(head / p.heads, head % p.heads, grad_bias + head * p.tokens, grad_cross_bias + head);
  }
  if (p.grad_token_bias && p.tokens) {
    T* to = static_cast<T*>(p.grad_token_bias);
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t t = 0; t < p.tokens; ++t) {
        T sum = 0;
        for (int64_t h = 0; h < p.heads; ++h) sum += grad_bias[(b * p.heads + h) * p.tokens + t];
        to[b * p.tokens + t] = sum;
      }
  }
  if (p.grad_cross_bias && p.cross_key.data) {
    T sum = 0;
    for (int64_t head = 0; head < plan.heads; ++head) sum += grad_cross_bias[head];
    *static_cast<T*>(p.grad_cross_bias) = sum;
  }
}

// Call f with the storage and accumulation types of the problem; false where they are not built in.
template <class F>
bool with_types(const Problem& p, F f) {
  switch (p.data_type) {
    case FLOAT32:
      f(float{}, float{});
      return true;
    case FLOAT64:
      f(double{}, double{});
      return true;
    case BFLOAT16:
      f(BFloat16{}, float{});
      return true;
#ifdef __FLT16_MAX__
    case FLOAT16:
      f(Float16{}, float{});
      return true;
#endif
  }
  return false;
}

int32_t result(bool served, char* message, int64_t message_bytes) {
  if (served) return 0;
  std::snprintf(message, static_cast<size_t>(message_bytes),
                "this data type is not in the CPU kernels of local attention; use float32, bfloat16 or float64");
  return 1;
}

}  // namespace
}  // namespace local_attention

using namespace local_attention;

extern "C" {

int64_t local_attention_problem_bytes() { return sizeof(Problem); }

int64_t local_attention_workspace_bytes(const Problem* problem, int32_t backward) {
  int64_t bytes = 0;
  with_types(*problem, [&](auto s, auto t) {
    bytes = Plan<decltype(s), decltype(t)>(*problem, backward != 0).bytes();
  });
  return bytes;
}

const char* local_attention_kernel(const Problem*, int32_t) { return VECTOR_BYTES == 64 ? "cpu_512" : "cpu_256"; }

int32_t local_attention_forward(const Problem* problem, void*, char* message, int64_t message_bytes) {
  const bool served = with_types(*problem, [&](auto s, auto t) { forward<decltype(s), decltype(t)>(*problem); });
  return result(served, message, message_bytes);
}

int32_t local_attention_backward(const Problem* problem, void*, char* message, int64_t message_bytes) {
  const bool served = with_types(*problem, [&](auto s, auto t) { backward<decltype(s), decltype(t)>(*problem); });
  return result(served, message, message_bytes);
}
}
