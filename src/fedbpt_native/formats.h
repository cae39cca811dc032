#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fedbpt {

// The part of a model's layers that is stored as one ggml type.
struct WeightFormat {
    std::string type;  // q4_1, q6_K, f16, ...
    uint64_t n_params = 0;
    uint64_t n_bytes = 0;
};

// Formats of the matrices in a model's layers (tensors blk.* of all its files), most parameters first. Embedding and
// output layer are left out: a token reads one row of the former, labels a few of the latter. Throws ModelFileError.
std::vector<WeightFormat> weight_formats(const std::string & path);

struct TensorShape {
    std::string name;
    std::vector<int64_t> shape;  // ggml's order: the inputs of a matrix first
};

// All tensors of a model, in the order of its files. Throws ModelFileError.
std::vector<TensorShape> tensor_shapes(const std::string & path);

// FLOP/s (multiplications and additions per second of CPU time) of one thread multiplying 64 tokens by a matrix of a
// ggml type, in the kind of buffer that llama.cpp would put a weight in. Measured in each call, for about 10 ms.
// Throws InputError.
double matmul_flops(const std::string & type);

}  // namespace fedbpt
