#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace fedbpt {

struct TrialSettings {
    int32_t n_threads = 1;
    int32_t n_gpu_layers = 0;
    std::string gpu;
    bool kv_q8_0 = false;
};

// Loads a model file and runs each operation once on small inputs: tokenisation and back, scoring in both placements,
// text generation, the chat template. Calls on_stage before each with its description ("while it is loaded").
// llama.cpp ends the process on some inconsistent files, so run this in a separate process (see try_alone). Throws as
// Model::load, and ModelFileError if the model cannot tokenise or its results are not finite.
void try_model(const std::string & path, const TrialSettings & settings,
               const std::function<void(const char * stage)> & on_stage);

struct ProcessLimits {
    uint64_t memory_bytes = 0;  // writable memory; 0: no limit
    uint64_t cpu_seconds = 0;   // of all threads; 0: no limit
};

// Runs try_model in a process that exists only for this. The process ends with its parent, leaves no core file, is the
// first that the system ends if memory runs out, and is ended by a signal beyond the limits. Writes lines to standard
// output: "stage WHAT"; "abort WHY" before llama.cpp ends the process; last "passed", or "refused TYPE WHY" with the
// name of a class in fedbpt.errors.
void try_alone(const std::string & path, const TrialSettings & settings, const ProcessLimits & limits);

}  // namespace fedbpt
