#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "formats.h"
#include "parts.h"
#include "requantize.h"

namespace py = pybind11;

namespace fedbpt {

namespace {

void requantize_file(const std::string & source, const std::string & target, const std::string & format,
                     int32_t n_threads, const std::optional<py::function> & progress) {
    const auto go_on = [&](int done, int total) {
        py::gil_scoped_acquire acquire;
        try {
            if (progress) {
                (*progress)(done, total);
            }
        } catch (py::error_already_set & error) {
            error.restore();
            return false;
        }
        return PyErr_CheckSignals() == 0;
    };
    bool done;
    {
        py::gil_scoped_release release;
        done = requantize(source, target, format, n_threads, go_on);
    }
    if (!done) {
        throw py::error_already_set();  // raised by progress or a signal handler
    }
}

py::list model_parts_of(const std::string & path) {
    std::vector<std::string> found;
    {
        py::gil_scoped_release release;
        found = model_parts(path);
    }
    py::list parts;
    for (const std::string & part : found) {
        parts.append(py::bytes(part));  // a path may be invalid UTF-8
    }
    return parts;
}

py::list weight_formats_of(const std::string & path) {
    std::vector<WeightFormat> found;
    {
        py::gil_scoped_release release;
        found = weight_formats(path);
    }
    py::list formats;
    for (const WeightFormat & format : found) {
        formats.append(py::make_tuple(format.type, format.n_params, format.n_bytes));
    }
    return formats;
}

py::list tensor_shapes_of(const std::string & path) {
    std::vector<TensorShape> found;
    {
        py::gil_scoped_release release;
        found = tensor_shapes(path);
    }
    py::list shapes;
    for (const TensorShape & tensor : found) {
        // a damaged file may hold invalid UTF-8
        const auto name = py::reinterpret_steal<py::object>(
            PyUnicode_DecodeUTF8(tensor.name.data(), static_cast<py::ssize_t>(tensor.name.size()), "backslashreplace"));
        shapes.append(py::make_tuple(name, py::tuple(py::cast(tensor.shape))));
    }
    return shapes;
}

}  // namespace

void register_formats(py::module_ & module) {
    module.def("requantize_formats", &requantize_formats, "Formats that requantize can write, smallest first.");
    module.def("requantize", &requantize_file, py::arg("source"), py::arg("target"), py::arg("format"),
               py::arg("n_threads"), py::arg("progress") = py::none(),
               "Write a model file in another format; progress is called with (tensors done, total).");
    module.def("model_parts", &model_parts_of, py::arg("path"),
               "Files of a model in order, from any part of a split model, or the only file.");
    module.def("weight_formats", &weight_formats_of, py::arg("path"),
               "(ggml type, parameters, bytes) of the matrices in a model's layers, most parameters first.");
    module.def("tensor_shapes", &tensor_shapes_of, py::arg("path"),
               "(name, shape) of every tensor of a model, in ggml's order: a matrix is (inputs, outputs).");
    module.def("matmul_flops", &matmul_flops, py::arg("type"), py::call_guard<py::gil_scoped_release>(),
               "Measure the FLOP/s of one CPU thread multiplying by a matrix of a ggml type.");
}

}  // namespace fedbpt
