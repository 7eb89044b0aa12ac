// The library's interface (problem.h): chooses kernels and starts them.
#include <cstdio>
#include <cstring>

#include "../problem.h"
#include "tensor_core_launch.cuh"

namespace local_attention {
namespace {

const char* wrong_with(const Problem& p) {
  if (p.data_type < FLOAT32 || p.data_type > FLOAT16) return "local attention: unknown data type";
  if (p.channels < 1 || p.channels > plain::MOST_CHANNELS)
    return "local attention: the CUDA kernels take 1 to 256 channels per head";
  if (p.rows >= 1 << 20 || p.columns >= 1 << 20 || p.rows * p.columns >= int64_t{1} << 31)
    return "local attention: a grid may have at most 2^31 cells";
  return nullptr;
}

template <template <typename> class Action, typename... Arguments>
void for_type(const Problem& p, Arguments&&... arguments) {
  switch (p.data_type) {
    case FLOAT32: return Action<float>::run(p, arguments...);
    case FLOAT64: return Action<double>::run(p, arguments...);
    case BFLOAT16: return Action<Bfloat16>::run(p, arguments...);
    default: return Action<Float16>::run(p, arguments...);
  }
}

// float32 and float64 never reach the tensor cores.
template <typename T>
struct Forward {
  static void run(const Problem& p, Failure& failure, Stream stream) { plain::run_forward<T>(failure, p, stream); }
};
template <typename T>
void run_half_forward(const Problem& p, Failure& failure, Stream stream) {
  const tile::StripPlan plan =
      tensor_core::suits(p) ? tensor_core::plan_forward(p, device_limits()) : tile::StripPlan{};
  if (plan.bytes)
    tensor_core::run_forward<T>(failure, p, plan, stream);
  else
    plain::run_forward<T>(failure, p, stream);
}
template <>
struct Forward<Bfloat16> {
  static void run(const Problem& p, Failure& failure, Stream stream) { run_half_forward<Bfloat16>(p, failure, stream); }
};
template <>
struct Forward<Float16> {
  static void run(const Problem& p, Failure& failure, Stream stream) { run_half_forward<Float16>(p, failure, stream); }
};

template <typename T>
struct Backward {
  static void run(const Problem& p, Failure& failure, Stream stream) { plain::run_backward<T>(failure, p, stream); }
};
template <typename T>
void run_half_backward(const Problem& p, Failure& failure, Stream stream) {
  const tensor_core::BackwardPlan plan =
      tensor_core::suits(p) ? tensor_core::plan_backward(p, device_limits()) : tensor_core::BackwardPlan{};
  if (plan.fits)
    tensor_core::run_backward<T>(failure, p, plan, stream);
  else
    plain::run_backward<T>(failure, p, stream);
}
template <>
struct Backward<Bfloat16> {
  static void run(const Problem& p, Failure& failure, Stream stream) {
    run_half_backward<Bfloat16>(p, failure, stream);
  }
};
template <>
struct Backward<Float16> {
  static void run(const Problem& p, Failure& failure, Stream stream) { run_half_backward<Float16>(p, failure, stream); }
};

int32_t report(const char* text, char* message, int64_t message_bytes) {
  if (!text || !*text) return 0;
  if (message && message_bytes > 0) std::snprintf(message, static_cast<size_t>(message_bytes), "%s", text);
  return 1;
}

template <template <typename> class Action>
int32_t run(const Problem* problem, void* stream, char* message, int64_t message_bytes) {
  // An empty batch starts no blocks, but the gradient of the cross bias must still become 0.
  if (const char* wrong = wrong_with(*problem)) return report(wrong, message, message_bytes);
  Failure failure;
  for_type<Action>(*problem, failure, static_cast<Stream>(stream));
  return report(failure.text, message, message_bytes);
}

}  // namespace
}  // namespace local_attention

#define LOCAL_ATTENTION_EXPORT __attribute__((visibility("default")))

extern "C" {

LOCAL_ATTENTION_EXPORT int64_t local_attention_problem_bytes() { return sizeof(local_attention::Problem); }

LOCAL_ATTENTION_EXPORT int64_t local_attention_workspace_bytes(const local_attention::Problem* problem,
                                                               int32_t backward) {
  if (!backward) return 0;
  const int64_t wide = problem->data_type == local_attention::FLOAT64 ? 8 : 4;
  // Which kernels will serve is not known before all addresses are: enough for either.
  const int64_t plain = local_attention::plain::workspace_elements(*problem) * wide;
  const int64_t tensor_core = local_attention::tensor_core::workspace_bytes(*problem);
  return plain > tensor_core ? plain : tensor_core;
}

LOCAL_ATTENTION_EXPORT const char* local_attention_kernel(const local_attention::Problem* problem, int32_t backward) {
  using namespace local_attention;
  if (!tensor_core::suits(*problem)) return "plain";
  const Device device = device_limits();
  const tile::StripPlan plan = tensor_core::plan_forward(*problem, device);
  if (!plan.bytes || (backward && !tensor_core::plan_backward(*problem, device).fits)) return "plain";
  return tensor_core::name_of(*problem, plan);
}

LOCAL_ATTENTION_EXPORT int32_t local_attention_forward(const local_attention::Problem* problem, void* stream,
                                                       char* message, int64_t message_bytes) {
  return local_attention::run<local_attention::Forward>(problem, stream, message, message_bytes);
}

LOCAL_ATTENTION_EXPORT int32_t local_attention_backward(const local_attention::Problem* problem, void* stream,
                                                        char* message, int64_t message_bytes) {
  return local_attention::run<local_attention::Backward>(problem, stream, message, message_bytes);
}

#ifdef LOCAL_ATTENTION_EMULATED
// For tests: see tensor_core_launch.cuh and emulator.h.
LOCAL_ATTENTION_EXPORT void local_attention_emulated_plan(int32_t wanted) {
  local_attention::tensor_core::wanted_plan() = wanted;
}
LOCAL_ATTENTION_EXPORT int64_t local_attention_emulated_bank_conflicts() {
  return local_attention::emulation::bank_conflicts().exchange(0);
}
#endif

}  // extern "C"
