#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "errors.h"
#include "llama-pretokenizer.h"
#include "llama-soft-prompt.h"
#include "trace.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

using FloatArray = py::array_t<float, py::array::c_style>;

// A trace, and the soft prompt rows set in its context, which the fork does not copy.
class SoftTrace {
public:
    SoftTrace(const std::string & path, bool flash_attention) : trace(path, flash_attention) {}

    void set(llama_seq_id seq, llama_pos pos0, const FloatArray & rows) {
        if (seq < 0 || seq >= GraphTrace::kSeqs) {
            throw InputError("seq must be from 0 to " + std::to_string(GraphTrace::kSeqs - 1) + ", got " +
                             std::to_string(seq));
        }
        if (rows.ndim() != 2 || rows.shape(1) != trace.n_embd()) {
            throw InputError("rows must have shape [n_rows, " + std::to_string(trace.n_embd()) + "]");
        }
        std::vector<float> & kept = rows_[seq];
        kept.assign(rows.data(), rows.data() + rows.size());
        llama_soft_prompt_set(trace.context(), seq, pos0, static_cast<int32_t>(rows.shape(0)), kept.data());
    }

    void clear() {
        llama_soft_prompt_clear(trace.context());
        rows_.clear();
    }

    GraphTrace trace;

private:
    std::map<llama_seq_id, std::vector<float>> rows_;
};

}  // namespace

void register_trace(py::module_ & module) {
    module.def("use_std_regex", &llama_pretokenizer_use_std_regex, py::arg("use"),
               "For tests of the fork: whether this thread's pre-tokenizer uses std::regex, as upstream does.");

    py::class_<SoftTrace>(
        module, "GraphTrace",
        "For tests of the fork: records the nodes of each graph that a small context computes, a line each. See "
        "trace.h.")
        .def(py::init<const std::string &, bool>(), py::arg("path"), py::arg("flash_attention"))
        .def(
            "decode",
            [](SoftTrace & self, const std::vector<llama_token> & tokens, llama_seq_id seq, llama_pos pos0) {
                return self.trace.decode(tokens, seq, pos0);
            },
            py::arg("tokens"), py::arg("seq") = 0, py::arg("pos0") = 0,
            "Run one llama_decode of tokens, with logits for the last; return the graph's lines.")
        .def("set_soft_prompt", &SoftTrace::set, py::arg("seq"), py::arg("pos0"), py::arg("rows"),
             "rows float32 [n_rows, n_embd]")
        .def("clear_soft_prompt", &SoftTrace::clear)
        .def_property_readonly("n_embd", [](const SoftTrace & self) { return self.trace.n_embd(); })
        .def_property_readonly(
            "n_reused", [](const SoftTrace & self) { return self.trace.n_reused(); },
            "Number of graphs that were reused instead of built.");
}

}  // namespace fedbpt
