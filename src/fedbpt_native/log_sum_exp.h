#pragma once

#include <cstddef>

namespace fedbpt {

// log Σ exp(values[i]) over n > 0 values, with an error of at most 1e-5; NaN if a value is NaN or all are -infinity.
double log_sum_exp(const float * values, size_t n);

}  // namespace fedbpt
