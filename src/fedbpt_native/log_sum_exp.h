#pragma once

#include <cstddef>

namespace fedbpt {

// log Σ exp(values[i]) over n > 0 values; NaN where one is NaN or all are -infinity. Within 1e-5 of the exact one.
double log_sum_exp(const float * values, size_t n);

}  // namespace fedbpt
