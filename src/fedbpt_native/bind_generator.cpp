#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "errors.h"
#include "generator.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

using IntArray = py::array_t<int32_t, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;

std::unique_ptr<Generator::Stream> open(const std::shared_ptr<Generator> & generator, const IntArray & ids,
                                        const FloatArray & rows, size_t rows_at, float temperature, float top_p,
                                        int32_t top_k, uint32_t seed,
                                        const std::optional<std::tuple<int32_t, int32_t, bool>> & shifted,
                                        const std::string & grammar, size_t n_said) {
    const auto [first, n, continued] = shifted.value_or(std::tuple<int32_t, int32_t, bool>{});
    Input input{ { ids.data(), ids.data() + ids.size() },
                 { rows.data(), rows.data() + rows.size() },
                 rows_at,
                 { first, n, continued } };
    py::gil_scoped_release release;
    auto stream = generator->open(std::move(input), { temperature, top_p, top_k, seed }, grammar, n_said);
    stream->keep_alive(generator);  // not py::keep_alive, which crashes where an argument has another type
    return stream;
}

py::tuple next(Generator & generator, Generator::Stream & stream, size_t n_likeliest) {
    const std::function<bool()> stop = [] {  // runs Python's signal handlers if this is the main thread
        py::gil_scoped_acquire acquire;
        return PyErr_CheckSignals() != 0;
    };
    Choice choice;
    try {
        py::gil_scoped_release release;
        choice = generator.next(stream, n_likeliest, stop);
    } catch (...) {
        if (PyErr_Occurred()) {  // a signal handler's exception takes precedence
            throw py::error_already_set();
        }
        throw;
    }
    return py::make_tuple(choice.id, choice.log_prob, choice.likeliest);
}

// For each stream (id, log-probability, likeliest), or a Choice's number in the place of a token.
py::list next_all(Generator & generator, const std::vector<Generator::Stream *> & streams,
                  const std::vector<size_t> & n_likeliest) {
    if (streams.size() != n_likeliest.size()) {
        throw InputError("n_likeliest must have a number for each stream");
    }
    const std::function<bool()> stop = [] {
        py::gil_scoped_acquire acquire;
        return PyErr_CheckSignals() != 0;
    };
    std::vector<Choice> choices;
    try {
        py::gil_scoped_release release;
        choices = generator.next_all(streams, n_likeliest, stop);
    } catch (...) {
        if (PyErr_Occurred()) {
            throw py::error_already_set();
        }
        throw;
    }
    py::list found;
    for (const Choice & choice : choices) {
        if (choice.id < 0) {
            found.append(choice.id);
        } else {
            found.append(py::make_tuple(choice.id, choice.log_prob, choice.likeliest));
        }
    }
    return found;
}

IntArray chat_ids(const Generator & generator, const std::vector<std::pair<std::string, std::string>> & messages) {
    std::vector<llama_token> ids;
    {
        py::gil_scoped_release release;
        ids =
            generator.model().tokenize(generator.model().chat_text(messages), /*add_bos =*/-1, /*parse_special =*/true);
    }
    return IntArray(static_cast<py::ssize_t>(ids.size()), ids.data());
}

IntArray text_ids(const Generator & generator, const std::string & text) {
    std::vector<llama_token> ids;
    {
        py::gil_scoped_release release;
        ids = generator.model().tokenize(text, /*add_bos =*/-1, /*parse_special =*/true);
        const llama_token bos = llama_vocab_bos(llama_model_get_vocab(generator.model().get()));
        if (ids.size() > 1 && ids[0] == bos && ids[1] == bos) {  // the text begins with BOS itself
            ids.erase(ids.begin());
        }
    }
    return IntArray(static_cast<py::ssize_t>(ids.size()), ids.data());
}

bool has_special(const Generator & generator, const std::string & text) {
    return generator.model().tokenize(text, 0, /*parse_special =*/true) != generator.model().tokenize(text, 0);
}

}  // namespace

void register_generator(py::module_ & module) {
    py::class_<Generator, py::smart_holder> generator(
        module, "Generator",
        "Generates texts token by token; made by Engine.generator. Thread-safe: calls that compute are serialised.");

    py::class_<Generator::Stream, py::smart_holder>(generator, "Stream")
        .def("cancel", &Generator::Stream::cancel, "Make the call in flight, or the next, raise ScoringInterrupted.")
        .def_property_readonly("n_reused", &Generator::Stream::n_reused);

    generator
        .def("open", &open, py::arg("ids").noconvert(), py::arg("rows").noconvert(), py::arg("rows_at"),
             py::arg("temperature"), py::arg("top_p"), py::arg("top_k"), py::arg("seed"),
             py::arg("shifted") = py::none(), py::arg("grammar") = "", py::arg("n_said") = 0,
             "ids int32 [n], rows float32 [n_rows, n_embd]")
        .def_static("json_grammar", &json_grammar, py::arg("schema"), py::call_guard<py::gil_scoped_release>(),
                    "GBNF of the JSON that a JSON schema, given as JSON, allows")
        .def("next", &next, py::arg("stream"), py::arg("n_likeliest"),
             "(id, log-probability, [(id, log-probability) of the likeliest])")
        .def("next_all", &next_all, py::arg("streams"), py::arg("n_likeliest"),
             "`next` of several streams in one pass; −1: it was cancelled, −2: its logits are not finite, −3: no token "
             "fits its grammar, −4: the context is full")
        .def_property_readonly_static("n_places", [](const py::object &) { return Generator::kTexts; })
        .def(
            "piece", [](const Generator & generator, llama_token id) { return py::bytes(generator.model().piece(id)); },
            py::arg("id"))
        .def(
            "is_end", [](const Generator & generator, llama_token id) { return generator.model().is_end(id); },
            py::arg("id"))
        .def("text_ids", &text_ids, py::arg("text"),
             "token ids int32 [n] of a text; special tokens are parsed, BOS comes at most once")
        .def("chat_ids", &chat_ids, py::arg("messages"),
             "token ids int32 [n] of (role, content) messages in the model's chat template; special tokens are parsed")
        .def("has_special", &has_special, py::arg("text"), py::call_guard<py::gil_scoped_release>(),
             "whether a text contains special tokens")
        .def_property_readonly("n_tokens", &Generator::n_tokens)
        .def_property_readonly("n_cells", &Generator::n_cells);
}

}  // namespace fedbpt
