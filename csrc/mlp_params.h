// The one description of a call that adds a bias and then applies GELU or adds a residual;
// stat_kernels/reference.py says what is computed. Plain data and C types only, as in sta_params.h.
#ifndef STA_MLP_PARAMS_H_
#define STA_MLP_PARAMS_H_

#include "sta_params.h"

// All matrices are contiguous (rows, columns), except that bias and grad_bias are (columns).
struct StaMlpParams {
  int64_t rows, columns;
  int32_t dtype;       // StaDtype of x and grad_x, and, with GELU, of out and grad_out
  int32_t skip_dtype;  // residual: of skip, out and grad_out; `dtype`, or STA_F32 for 16-bit x

  const void* x;
  const void* bias;   // float, double for STA_F64; as scale and grad_bias
  const void* skip;   // residual only
  const void* scale;  // residual only: one factor for `scale_rows` rows; NULL for none
  int64_t scale_rows;
  void* out;  // forward writes it

  // Backward only, written in full.
  const void* grad_out;
  void* grad_x;  // residual: NULL where it would be grad_out itself
  void* grad_bias;
};

#endif  // STA_MLP_PARAMS_H_
