#pragma once

// ggml's backends. A wheel for many CPUs has the CPU's code several times, each a library that is loaded at run time
// (GGML_BACKEND_DL): whatever the CPU backend implements is asked of its registry, and never linked.

#include <cstdint>
#include <string>
#include <vector>

#include "ggml-backend.h"

namespace fedbpt {

// Starts llama.cpp, once a process: its log and its backends. Those that are libraries lie beside this module; of the
// CPU's, the best that this CPU can run is loaded. Throws std::runtime_error where there is none.
void start_backends();

ggml_backend_dev_t cpu_device();

struct Gpu {
    std::string name, description;
    uint64_t memory_bytes, free_bytes;
};

// Those that this build and machine have.
std::vector<Gpu> gpus();

bool is_on_gpu(ggml_backend_buffer_type_t type);

// What llama_model_params.devices takes: the GPU of that name, or no GPU at all where it is empty. Throws InputError.
std::vector<ggml_backend_dev_t> only_gpu(const std::string & name);

// A function of the CPU backend, as in cpu_function<decltype(ggml_threadpool_new)>("ggml_threadpool_new"). After
// start_backends.
template <typename Function>
Function * cpu_function(const char * name) {
    return reinterpret_cast<Function *>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name));
}

}  // namespace fedbpt
