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

// Loads a model file and does once and small what is ever done with a model: texts to tokens and back, scores in both
// placements, a text generated, a chat template filled in. on_stage hears what comes next ("while it is loaded").
// llama.cpp ends the process on some files that contradict themselves: this is for a process of its own (see
// try_alone). Throws what Model::load throws; ModelFileError: what the model computes is no number.
void try_model(const std::string & path, const TrialSettings & settings,
               const std::function<void(const char * stage)> & on_stage);

struct ProcessLimits {
    uint64_t memory_bytes = 0;  // that the process may write to; 0: as many as there are
    uint64_t cpu_seconds = 0;   // of all threads; 0: as many as it takes
};

// try_model in a process that is there for nothing else: it ends with its parent, leaves no core file, is the first
// that a system short of memory ends, and is ended by a signal beyond the limits. On standard output, a line each:
// "stage WHAT"; "abort WHY" before llama.cpp ends the process; last "passed", or "refused TYPE WHY" with the name of a
// class in fedbpt.errors.
void try_alone(const std::string & path, const TrialSettings & settings, const ProcessLimits & limits);

}  // namespace fedbpt
