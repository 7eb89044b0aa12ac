// What one call of the operator is about: sizes, windows, and where the tensors lie.
//
// Plain data, mirrored field by field by problem.py. The kernels know neither torch nor Python: Python checks
// and allocates, then passes this. Dims: B batch, Y X query grid, H heads, D channels, T tokens.
#pragma once

#include <cstdint>

#include "window.h"

namespace local_attention {

enum DataType : int32_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

// [B, Y, X, H, D] or, for tokens, [B, T, H, D] (the token is the column). Strides in elements; stride 1 along D.
struct View {
  void* data;  // null: this tensor is not part of the problem
  int64_t batch, row, column, head;
};

// "Wide" is the type of accumulation: double for FLOAT64, float for everything else.
struct Problem {
  int64_t data_type;                       // of every View
  int64_t batch, rows, columns, heads, channels;
  int64_t cross_rows, cross_columns;       // the coarse grid; each divides the query grid's
  int64_t tokens;
  Window window, cross_window;             // in cells of their own grid
  double scale;                            // factor of every score, before the biases
  double dropout;                          // probability that a softmax weight is dropped, 0 <= p < 1
  int64_t threads;                         // of the CPU kernels

  View query, key, value;                  // key.data null: no local part
  View cross_key, cross_value;             // null: no coarse grid
  View token_key, token_value;             // null: no tokens
  const void* token_bias;                  // wide, contiguous [B, T], or null
  const void* cross_bias;                  // wide, one number, or null
  const int64_t* seed;                     // one number, or null (then dropout is 0)

  View out;
  void* lse;                               // wide, contiguous [B, Y, X, H]; natural logarithm

  // Backward only. A gradient whose data is null is not wanted.
  View grad_out;
  const void* grad_lse;                    // wide, contiguous [B, Y, X, H], or null
  View grad_query, grad_key, grad_value, grad_cross_key, grad_cross_value, grad_token_key, grad_token_value;
  void* grad_token_bias;                   // wide, contiguous [B, T]
  void* grad_cross_bias;                   // wide, one number

  void* workspace;                         // scratch of workspace_bytes(), same device
};

}  // namespace local_attention

// The interface of every build. `stream` is a cudaStream_t, ignored on the CPU. 0 means success; otherwise one
// sentence is in `message`. Nothing here throws.
extern "C" {
int64_t local_attention_problem_bytes();
int64_t local_attention_workspace_bytes(const local_attention::Problem* problem, int32_t backward);
// Which kernel would serve the problem, for logs, tests and benchmarks: a static string such as "plain".
const char* local_attention_kernel(const local_attention::Problem* problem, int32_t backward);
int32_t local_attention_forward(const local_attention::Problem* problem, void* stream, char* message,
                                int64_t message_bytes);
int32_t local_attention_backward(const local_attention::Problem* problem, void* stream, char* message,
                                 int64_t message_bytes);
}
