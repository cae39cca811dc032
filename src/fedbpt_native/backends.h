#pragma once

// ggml's backends. A wheel for many CPUs contains the CPU backend in several variants, as libraries that are loaded at
// run time (GGML_BACKEND_DL): functions of the CPU backend are therefore looked up in its registry, never linked.

#include <cstdint>
#include <string>
#include <vector>

#include "ggml-backend.h"

namespace fedbpt {

// Initialises llama.cpp's log and backends, once per process. Backend libraries are loaded from this module's folder;
// of the CPU variants, the best that this CPU supports. Throws std::runtime_error if there is none.
void start_backends();

ggml_backend_dev_t cpu_device();

struct Gpu {
    std::string name, description;
    uint64_t memory_bytes, free_bytes;
};

// The GPUs of this machine that this build supports.
std::vector<Gpu> gpus();

bool is_on_gpu(ggml_backend_buffer_type_t type);

// A value for llama_model_params.devices: the GPU of that name, or no GPU if `name` is empty. Throws InputError.
std::vector<ggml_backend_dev_t> only_gpu(const std::string & name);

// Looks up a function of the CPU backend: cpu_function<decltype(ggml_threadpool_new)>("ggml_threadpool_new"). Requires
// start_backends.
template <typename Function>
Function * cpu_function(const char * name) {
    return reinterpret_cast<Function *>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name));
}

}  // namespace fedbpt
