#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "backends.h"
#include "errors.h"
#include "generator.h"
#include "model.h"
#include "scorer.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

using IntArray = py::array_t<int32_t, py::array::c_style>;
using LongArray = py::array_t<int64_t, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;

// A model and its scorer: one object for Python.
class Engine {
public:
    Engine(const std::string & path, int32_t n_threads, int32_t n_gpu_layers, const std::string & gpu, bool kv_q8_0)
        : model(Model::load(path, n_gpu_layers, gpu)),
          kv_type(kv_q8_0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16),
          scorer(model, n_threads, kv_type) {}

    // Shares the weights; has its own threads and buffers.
    explicit Engine(const Engine & other)
        : model(other.model),
          kv_type(other.kv_type),
          scorer(model, other.scorer.n_threads(), kv_type) {}

    std::unique_ptr<Generator> generator() const {
        return std::make_unique<Generator>(model, scorer.n_threads(), kv_type);
    }

    const std::shared_ptr<const Model> model;
    const ggml_type kv_type;
    Scorer scorer;
};

IntArray tokenize(const Engine & engine, const std::string & text, std::optional<bool> add_bos) {
    std::vector<llama_token> ids;
    {
        py::gil_scoped_release release;
        ids = engine.model->tokenize(text, add_bos ? static_cast<int>(*add_bos) : -1);
    }
    return IntArray(static_cast<py::ssize_t>(ids.size()), ids.data());
}

FloatArray token_embeddings(const Engine & engine, const IntArray & ids) {
    FloatArray rows({ ids.size(), static_cast<py::ssize_t>(engine.model->n_embd()) });
    engine.model->token_embeddings(ids.data(), static_cast<size_t>(ids.size()), rows.mutable_data());
    return rows;
}

// Runs Python's signal handlers on the calling thread; true if one raised (KeyboardInterrupt).
bool python_wants_to_stop() {
    py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

template <typename T>
std::vector<T> to_vector(const py::array_t<T, py::array::c_style> & array) {
    return std::vector<T>(array.data(), array.data() + array.size());
}

using RaggedArrays = std::pair<IntArray, LongArray>;

Ragged to_ragged(const RaggedArrays & sequences) {
    return { to_vector(sequences.first), to_vector(sequences.second) };
}

// First layer, number of layers, and whether the continuations' tokens are shifted too.
using Shifted = std::tuple<int32_t, int32_t, bool>;

std::unique_ptr<Plan> make_plan(const Engine & engine, const RaggedArrays & texts,
                                const std::optional<IntArray> & label_ids, bool cue, const IntArray & prefix,
                                const RaggedArrays & continuations, std::vector<int32_t> layers,
                                uint64_t kv_budget_bytes, const std::optional<Shifted> & shifted) {
    const auto [first, n, continued] = shifted.value_or(Shifted{});
    return std::make_unique<Plan>(
        engine.model, to_ragged(texts),
        shifted ? Placement::shift
        : cue   ? Placement::cue
                : Placement::front,
        to_vector(prefix), !label_ids, label_ids ? to_vector(*label_ids) : std::vector<llama_token>(),
        to_ragged(continuations), std::move(layers), kv_budget_bytes, ShiftedLayers{ first, n, continued });
}

void score_into(Engine & engine, Plan & plan, const LongArray & which, const FloatArray & embeds, FloatArray & logits,
                FloatArray * states) {
    if (!plan.is_for(*engine.model)) {
        throw InputError(
            "this plan was compiled by another scorer: compile its texts with the scorer that scores them");
    }
    float * out = logits.mutable_data();
    float * states_out = states != nullptr ? states->mutable_data() : nullptr;

    const std::function<bool()> stop = python_wants_to_stop;
    try {
        py::gil_scoped_release release;
        engine.scorer.score(plan, which.data(), static_cast<size_t>(which.size()), embeds.data(),
                            static_cast<size_t>(embeds.shape(0)), static_cast<size_t>(embeds.shape(1)), out, states_out,
                            stop);
    } catch (...) {
        if (PyErr_Occurred()) {  // a signal handler's exception takes precedence
            throw py::error_already_set();
        }
        throw;
    }
}

FloatArray logits_for(const Plan & plan, const LongArray & which, const FloatArray & embeds) {
    return FloatArray({ embeds.shape(0), which.size(), static_cast<py::ssize_t>(plan.n_columns()) });
}

FloatArray score(Engine & engine, Plan & plan, const LongArray & which, const FloatArray & embeds) {
    FloatArray logits = logits_for(plan, which, embeds);
    score_into(engine, plan, which, embeds, logits, nullptr);
    return logits;
}

std::pair<FloatArray, FloatArray> score_states(Engine & engine, Plan & plan, const LongArray & which,
                                               const FloatArray & embeds) {
    FloatArray logits = logits_for(plan, which, embeds);
    FloatArray states({ embeds.shape(0), which.size(), static_cast<py::ssize_t>(plan.layers().size()),
                        static_cast<py::ssize_t>(engine.model->n_embd()) });
    score_into(engine, plan, which, embeds, logits, &states);
    return { logits, states };
}

// For each candidate, each text's answer: its tokens and bytes.
std::vector<std::vector<std::pair<IntArray, py::bytes>>> generate(Engine & engine, Plan & plan, const LongArray & which,
                                                                  const FloatArray & embeds, float temperature,
                                                                  float top_p, int32_t top_k, uint32_t seed,
                                                                  size_t max_tokens, std::vector<std::string> stops) {
    if (!plan.is_for(*engine.model)) {
        throw InputError(
            "this plan was compiled by another scorer: compile its texts with the scorer that scores them");
    }
    const auto n_candidates = static_cast<size_t>(embeds.shape(0));
    const auto n_which = static_cast<size_t>(which.size());
    const Continuing how{ { temperature, top_p, top_k, seed }, max_tokens, std::move(stops) };
    const std::function<bool()> stop = python_wants_to_stop;
    std::vector<Answer> answers;
    try {
        py::gil_scoped_release release;
        answers = engine.scorer.generate(plan, which.data(), n_which, embeds.data(), n_candidates,
                                         static_cast<size_t>(embeds.shape(1)), how, stop);
    } catch (...) {
        if (PyErr_Occurred()) {  // a signal handler's exception takes precedence
            throw py::error_already_set();
        }
        throw;
    }
    std::vector<std::vector<std::pair<IntArray, py::bytes>>> found(n_candidates);
    for (size_t i = 0; i < answers.size(); ++i) {
        const Answer & answer = answers[i];
        found[i / n_which].emplace_back(IntArray(static_cast<py::ssize_t>(answer.ids.size()), answer.ids.data()),
                                        py::bytes(answer.text));
    }
    return found;
}

std::optional<py::bytes> metadata(const Engine & engine, const std::string & key) {
    char value[256];
    const int32_t n = llama_model_meta_val_str(engine.model->get(), key.c_str(), value, sizeof(value));
    return n < 0 ? std::nullopt : std::make_optional(py::bytes(value));
}

py::dict memory(const Engine & engine) {
    MemoryUse use;
    {
        py::gil_scoped_release release;
        use = engine.scorer.memory();
    }
    py::dict parts;
    parts["weights"] = use.weights;
    parts["kv"] = use.kv;
    parts["compute"] = use.compute;
    parts["gpu"] = use.gpu;
    return parts;
}

}  // namespace

void register_scorer(py::module_ & module) {
    py::class_<Plan, py::smart_holder>(
        module, "Plan",
        "A data set laid out for scoring; in cue placement it keeps the texts' KV. For the engine that made it.")
        .def_property_readonly("n_texts", &Plan::n_texts)
        .def_property_readonly("n_tokens", &Plan::n_tokens)
        .def_property_readonly("kv_bytes", &Plan::kv_bytes)
        .def_property_readonly("n_kept", &Plan::n_kept);

    py::class_<Engine, py::smart_holder>(
        module, "Engine", "A loaded model and its scorer. Thread-safe: calls that compute wait for each other.")
        .def(py::init<const std::string &, int32_t, int32_t, const std::string &, bool>(), py::arg("path"),
             py::arg("n_threads"), py::arg("n_gpu_layers"), py::arg("gpu"), py::arg("kv_q8_0"),
             py::call_guard<py::gil_scoped_release>())
        .def("tokenize", &tokenize, py::arg("text"), py::arg("add_bos") = py::none(), "int32 [n]")
        .def("token_embeddings", &token_embeddings, py::arg("ids").noconvert(), "float32 [n, n_embd]")
        .def("plan", &make_plan, py::arg("texts").noconvert(), py::arg("label_ids").noconvert(), py::arg("cue"),
             py::arg("prefix").noconvert(), py::arg("continuations").noconvert(), py::arg("layers"),
             py::arg("kv_budget_bytes"), py::arg("shifted") = py::none(),
             "texts and continuations: (int32 [total], int64 offsets [n + 1])")
        .def("score", &score, py::arg("plan"), py::arg("which").noconvert(), py::arg("embeds").noconvert(),
             "which int64 [n], embeds float32 [n_candidates, n_prompt, n_embd] -> float32 [n_candidates, n, "
             "n_continuations + n_labels]")
        .def("score_states", &score_states, py::arg("plan"), py::arg("which").noconvert(),
             py::arg("embeds").noconvert(),
             "as score, and float32 [n_candidates, n, n_layers, n_embd]: hidden states at each text's last token")
        .def("generate", &generate, py::arg("plan"), py::arg("which").noconvert(), py::arg("embeds").noconvert(),
             py::arg("temperature"), py::arg("top_p"), py::arg("top_k"), py::arg("seed"), py::arg("max_tokens"),
             py::arg("stops"), "as score -> [n_candidates][n] answers: (int32 ids, bytes)")
        .def("metadata", &metadata, py::arg("key"), "value of a key in the model file's metadata, as text, or None")
        .def(
            "twin", [](const Engine & engine) { return std::make_unique<Engine>(engine); },
            py::call_guard<py::gil_scoped_release>(),
            "A new engine on the same weights, with its own threads and buffers.")
        .def("generator", &Engine::generator, py::call_guard<py::gil_scoped_release>(),
             "A new generator on the same weights, with its own KV cache.")
        .def(
            "interrupt", [](Engine & engine) { engine.scorer.interrupt(); },
            "Make the scoring call in flight raise ScoringInterrupted.")
        .def(
            "embedding_std", [](const Engine & engine) { return engine.model->embedding_std(); },
            py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("shares_beginnings",
                               [](const Engine & engine) { return engine.model->has_row_attention(); })
        .def_property_readonly("embedding_scale", [](const Engine & engine) { return engine.model->embedding_scale(); })
        .def_property_readonly("notes", [](const Engine & engine) { return engine.model->notes(); })
        .def("memory", &memory, "bytes by part")
        .def_property_readonly("n_embd", [](const Engine & engine) { return engine.model->n_embd(); })
        .def_property_readonly("n_layer",
                               [](const Engine & engine) { return llama_model_n_layer(engine.model->get()); })
        .def_property_readonly("n_vocab", [](const Engine & engine) { return engine.model->n_vocab(); })
        .def_property_readonly("n_ctx_train", [](const Engine & engine) { return engine.model->n_ctx_train(); })
        .def_property_readonly("n_threads", [](const Engine & engine) { return engine.scorer.n_threads(); })
        .def_property_readonly("architecture", [](const Engine & engine) { return engine.model->architecture(); })
        .def_property_readonly("description", [](const Engine & engine) { return engine.model->description(); });

    module.def(
        "gpus",
        [] {
            std::vector<std::tuple<std::string, std::string, uint64_t, uint64_t>> found;
            for (const Gpu & gpu : gpus()) {
                found.emplace_back(gpu.name, gpu.description, gpu.memory_bytes, gpu.free_bytes);
            }
            return found;
        },
        "(name, description, memory in bytes, free memory in bytes) of each GPU");
}

}  // namespace fedbpt
