#include <pybind11/pybind11.h>

#include "trial.h"

namespace py = pybind11;

namespace fedbpt {

void register_trial(py::module_ & module) {
    module.def(
        "try_alone",
        [](const std::string & path, int32_t n_threads, int32_t n_gpu_layers, const std::string & gpu, bool kv_q8_0,
           uint64_t memory_bytes, uint64_t cpu_seconds) {
            try_alone(path, { n_threads, n_gpu_layers, gpu, kv_q8_0 }, { memory_bytes, cpu_seconds });
        },
        py::arg("path"), py::arg("n_threads"), py::arg("n_gpu_layers"), py::arg("gpu"), py::arg("kv_q8_0"),
        py::arg("memory_bytes"), py::arg("cpu_seconds"), py::call_guard<py::gil_scoped_release>(),
        "Try a model file in a process that exists only for this. See trial.h for what it writes to standard output.");
}

}  // namespace fedbpt
