#include <pybind11/pybind11.h>

namespace fedbpt {

void register_errors(pybind11::module_ & module);
void register_formats(pybind11::module_ & module);
void register_generator(pybind11::module_ & module);
void register_scorer(pybind11::module_ & module);
void register_trace(pybind11::module_ & module);
void register_trial(pybind11::module_ & module);

}  // namespace fedbpt

PYBIND11_MODULE(_native, module) {
    module.doc() =
        "fedbpt's llama.cpp fork: scoring and generating texts under soft prompts. Use fedbpt.engine.native_scorer, "
        "which validates and documents.";

    fedbpt::register_errors(module);
    fedbpt::register_formats(module);
    fedbpt::register_generator(module);
    fedbpt::register_scorer(module);
#ifdef FEDBPT_TRACE
    fedbpt::register_trace(module);
#endif
    fedbpt::register_trial(module);
}
