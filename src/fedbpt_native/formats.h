#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fedbpt {

// What of a model's layers is stored as one ggml type.
struct WeightFormat {
    std::string type;  // q4_1, q6_K, f16, ...
    uint64_t n_params = 0;
    uint64_t n_bytes = 0;
};

// The matrices of the layers of a model, of all its files, by type, most parameters first; empty: none of its tensors
// is called blk.*. Embedding and output layer are left out: a token takes one row of the one, labels a few of the
// other. Throws ModelFileError.
std::vector<WeightFormat> weight_formats(const std::string & path);

struct TensorShape {
    std::string name;
    std::vector<int64_t> shape;  // ggml's order: the inputs of a matrix first
};

// Every tensor of a model, in the order of its files. Throws ModelFileError.
std::vector<TensorShape> tensor_shapes(const std::string & path);

// Multiplications and additions (each counts) that one CPU thread makes in a second of its time, multiplying 64 tokens
// by a matrix of a ggml type that lies where llama.cpp would place a weight. Measured anew at each call, in some 10 ms.
// Throws InputError.
double matmul_flops(const std::string & type);

}  // namespace fedbpt
